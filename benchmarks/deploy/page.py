"""The tables of docs/deploy.md, made of stored results and nothing else, between two marks in that page.

python -m benchmarks.deploy.page [results] [document]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shared.command_line import page_paths
from ..shared.markdown import head, row, write_between
from ..shared.places import RESULTS
from ..shared.runs import records_in
from .models import MODELS

BEGIN, END = "<!-- written by make deploy-benchmark -->", "<!-- end of what make deploy-benchmark wrote -->"


def main(argv: Sequence[str] | None = None) -> None:
    write_page(*page_paths(argv, __doc__, f"{RESULTS}/deploy", "docs/deploy.md"))


def write_page(results: Path, document: Path) -> None:
    """Write the tables into `document`, in the place of those that it has.

    Raises:
        ValueError: If nothing is stored in `results`, or the page has no place for it.
    """
    records = sorted(records_in(results), key=lambda record: list(MODELS).index(record["name"]))
    if not records:
        raise ValueError(f"{results} has no results; run `make deploy-benchmark` first.")
    tables = "\n".join([summary(records), *(table(record) for record in records)])
    write_between(document, BEGIN, END, tables)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Compare the engines, and the packed form with the faster of them."""
    lines = [
        *head(
            "model",
            "bits",
            "ONNX Runtime int8",
            "the same, tuned",
            "OpenVINO float",
            "OpenVINO int8",
            "packed is slower by",
        ),
    ]
    for record in records:
        outcome = record["outcome"]
        ratios = {timing["form"]: timing["ratio"] for timing in outcome["timings"]}
        better = min((ratios[form] for form in _INT8 if form in ratios), default=None)
        packed = f"{ratios['packed'] / better:.1f}" if better and "packed" in ratios else "-"
        cells = (f"{ratios[form]:.2f}" if form in ratios else "-" for form in _COLUMNS)
        lines.append(row(record["name"], next(iter(outcome["bits"])), *cells, packed))
    first = records[0]["outcome"]
    flags = ", ".join(first["machine"]["integer_flags"])
    versions = ", ".join(f"{library} {version}" for library, version in first["versions"].items())
    machine = first["machine"]["cpu"]
    told = (
        "Time of one image on one thread over that of ONNX Runtime with the float model, in the same run; the last "
        "column is the packed form's time over that of the fastest of them in integers. Tuned: exported with "
        '`tuned_for="onnxruntime"`; a dash where it was not measured. `-vnni`: exported with `target="cpu-vnni"`, '
        f"without layers in two halves. {machine}, integer instructions {flags}: others of them, other ratios. "
        f"{first['clock'].capitalize()} clock; {versions}.\n"
    )
    return "\n".join([told, *lines]) + "\n"


_COLUMNS = ("onnx-int8", "onnx-int8-tuned", "openvino-float", "openvino-int8")
_INT8 = ("onnx-int8", "onnx-int8-tuned", "openvino-int8")


def table(record: dict[str, Any]) -> str:
    """Show all forms of one model."""
    outcome = record["outcome"]
    forms = {form["name"]: form for form in outcome["forms"]}
    bits = ", ".join(f"{count} layers {name}" for name, count in outcome["bits"].items())
    weights = "real weights" if outcome["real_weights"] else "random weights"
    lines = [
        f"### {record['name']}",
        "",
        f"{bits}; {weights}, {outcome['images']}; {outcome['rounds']} rounds. Agreement is with the quantized model.",
        "",
        *head("form", "ms", "quartiles", "ratio", "memory, MB", "file, MB", "same top-1"),
    ]
    for timing in outcome["timings"]:
        form = forms[timing["form"]]
        quartiles = f"{1000 * timing['lower_quartile']:.1f} to {1000 * timing['upper_quartile']:.1f}"
        memory = "-" if timing["memory_bytes"] is None else f"{timing['memory_bytes'] / 1e6:.0f}"
        cells = (f"{1000 * timing['median']:.1f}", quartiles, f"{timing['ratio']:.2f}", memory)
        same = f"{form['same_top1']} of {outcome['count']}"
        lines.append(row(f"{form['name']}", *cells, f"{form['file_bytes'] / 1e6:.2f}", same))
    lines += [f"\n{form} was skipped: {reason}" for form, reason in outcome["skipped"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

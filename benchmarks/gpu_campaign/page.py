"""docs/gpu.md, made of what `make gpu-campaign` stored and nothing else.

python -m benchmarks.gpu_campaign.page [results] [document]
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..shared.command_line import page_paths
from ..shared.markdown import head, row
from ..shared.paired import difference
from ..shared.places import RESULTS
from ..shared.runs import records_in, write_whole

NOT_YET = (
    "No card was at hand when this page was written: nothing was measured. `make gpu-data` packs what is needed where "
    "the data is, `make gpu-campaign` runs it on a machine with a card, and this page is made of what it leaves in "
    "`benchmarks/results/gpu`. Its rehearsal on CPU is part of the tests."
)


def main(argv: Sequence[str] | None = None) -> None:
    results, document = page_paths(argv, __doc__, f"{RESULTS}/gpu", "docs/gpu.md")
    write_whole(document, page(results))
    print(document)


def page(results: Path) -> str:
    """The whole page."""
    lines = ["# What one GPU says", "", "Written by `make gpu-campaign`.", ""]
    path = results / "campaign.json"
    if not path.is_file():
        return "\n".join([*lines, NOT_YET, ""])
    report = json.loads(path.read_text(encoding="utf-8"))
    parts = [machine(report), tests(results / "tests.xml"), costs(results), training(results), ends(report)]
    return "\n".join(lines + [line for part in parts for line in part])


def machine(report: dict[str, Any]) -> list[str]:
    found = report["machine"]
    card = f"{found['card']}, {found['memory'] / 2**30:.0f} GiB" if "card" in found else "no card: a rehearsal on CPU"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [f"Machine: {card}, {found['cores']} cores; {versions}.", "", *[f"- {s}" for s in report["missing"]], ""]


def tests(path: Path) -> list[str]:
    """How many of the tests that CPU skips passed."""
    if not path.is_file():
        return []
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    number = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    bad = number["failures"] + number["errors"]
    passed = number["tests"] - bad - number["skipped"]
    said = f"{passed} of {number['tests']} tests that need a card passed, {bad} failed, {number['skipped']} skipped."
    return ["## Tests", "", said, *[f"- failed: `{name}`" for name in failed], ""]


def costs(results: Path) -> list[str]:
    """Time, memory, launches and waits of a step of each way to train."""
    lines: list[str] = []
    for record in records_in(results / "step_cost"):
        if record["name"].startswith("launches-"):
            continue
        a, outcome = record["arguments"], record["outcome"]
        path = results / "step_cost" / f"launches-{a['model']}-batch{a['batch_size']}-{a['device']}.json"
        counts = json.loads(path.read_text(encoding="utf-8"))["outcome"] if path.is_file() else {}
        plain = outcome["times"]["float"]["ratio"] if "float" in outcome["times"] else None
        lines += [
            f"### {a['model']}, batches of {a['batch_size']}, W{a['bits']}A{a['bits']}, {precision(a)}",
            "",
            f"A step of QAT takes {1000 * outcome['seconds_of_qat']:.1f} ms; kernels {a['backend']}.",
            "",
            *head("way to train", "time over QAT", "time over float", "peak memory, GiB", "launches", "waits"),
        ]
        for way, found in outcome["times"].items():
            count = counts.get(way)
            lines.append(
                row(
                    way,
                    f"{found['ratio']:.3f} [{found['lower_quartile']:.3f}, {found['upper_quartile']:.3f}]",
                    "-" if plain is None else f"{found['ratio'] / plain:.2f}",
                    f"{outcome['bytes'][way] / 2**30:.2f}",
                    "-" if count is None else f"{count['launches']:.0f}",
                    "-" if count is None else f"{count['waits']:.1f}",
                )
            )
        lines.append("")
    return ["## Costs of a step", "", "Medians over interleaved rounds, quartiles in brackets.", "", *lines]


def precision(arguments: dict[str, Any]) -> str:
    """Of products; runs in float32 do not name it."""
    return arguments.get("precision", "float32")


def training(results: Path) -> list[str]:
    """Test accuracy of each method, and its difference to QAT seed by seed."""
    runs: dict[str, dict[int, float]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for record in records_in(results / "accuracy"):
        a = record["arguments"]
        runs.setdefault(a["method"], {})[a["seed"]] = 100 * record["outcome"]["test"]
        settings[a["method"]] = a
    if "qat" not in runs:
        return []
    any_of_them = settings["qat"]
    lines = [
        f"## Training: {any_of_them['task']}, W{any_of_them['bits']}A{any_of_them['bits']}",
        "",
        f"{any_of_them['steps']} steps of {any_of_them['batch_size']} images, {precision(any_of_them)}.",
        "",
        *head("method", "seeds", "learning rate", "radius", "top-1 %", "minus QAT"),
    ]
    for method, by_seed in runs.items():
        a = settings[method]
        gain = difference(by_seed, runs["qat"]) if method != "qat" else None
        lines.append(
            row(
                method,
                str(len(by_seed)),
                f"{a['lr']:g}",
                f"{a['saq']['rho']:g}" if a["saq"] else "-",
                f"{mean(by_seed.values()):.2f}",
                "-" if gain is None else str(gain),
            )
        )
    return [*lines, ""]


def ends(report: dict[str, Any]) -> list[str]:
    lines = ["## Stages", "", *head("stage", "ended", "seconds")]
    lines += [row(n, s["state"], f"{s.get('seconds', 0):.0f}") for n, s in report["stages"].items()]
    return [*lines, ""]


if __name__ == "__main__":
    main()

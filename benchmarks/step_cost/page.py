"""docs/cost.md, made of stored results of `fake_quant.py`, `step_profile.py` and `sweep.py` and nothing else.

python -m benchmarks.step_cost.page [results] [document]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..shared.command_line import page_paths
from ..shared.markdown import head, row
from ..shared.paired import Difference, difference, half_width
from ..shared.places import RESULTS
from ..shared.runs import records_in
from ..shared.schedule_variants import QAT
from .allocator import keeps_memory
from .models import MODELS
from .step_profile import FORWARD

SUMMARY = ("full", "ascent 1/8", "last eighth", "echo 2", "previous")
"""Columns of the table over models, batch sizes and processes: the presets, and another way of one pass a step."""
PRESETS = ("`full`", "`balanced`", "`last_layers`", "`free`", "`previous`")


def main(argv: Sequence[str] | None = None) -> None:
    write_page(*page_paths(argv, __doc__, RESULTS, "docs/cost.md"))


def write_page(results: Path, document: Path) -> None:
    """Write the page to `document`.

    Raises:
        ValueError: If nothing is stored in `results`.
    """
    fakes = records_in(results, "fake_quant*.json")
    profiles = records_in(results, "step_profile.json")
    options = records_in(results / "options")
    steps = sorted(records_in(results / "step_cost"), key=order)
    if not fakes and not steps:
        raise ValueError(f"{results}: found neither fake_quant.json nor step_cost/*.json; run `make step-cost` first.")
    parts = [
        "# What quantized and sharpness-aware training cost\n\nWritten by `make step-cost` from "
        f"`{results.as_posix()}`: `fake_quant*.json` (of `make fake-quant`), `step_profile.json` and `step_cost`. "
        "Ratios are medians of what was measured side by side in one run.\n",
        fake_quantization(fakes) if fakes else "",
        accuracy_of_options(options) if options else "",
        *(step_in_parts(found) for found in profiles),
        summary(steps) if steps else "",
        *(one(record) for record in steps),
    ]
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(part for part in parts if part), encoding="utf-8")


FAKE_QUANT_WAYS = ("eager", "compiled", "compiled, inputs shared", "eager, input scale kept", "compiled, both")


def order(record: dict[str, Any]) -> tuple[int, int, int, str]:
    a = record["arguments"]
    return list(MODELS).index(a["model"]), a["processes"], a["batch_size"], a["device"]


def fake_quantization(runs: Sequence[dict[str, Any]]) -> str:
    """A step of plain QAT against float, single layers against other libraries, and what the backward pass keeps."""
    lines = [
        "## Fake quantization against float",
        "",
        "A training step of plain QAT over one of the float model. Quantization is passes over memory, and by default "
        "glibc hands memory back to the system whenever much of it is free: a step may then wait for its pages to be "
        'made anew, as the last column counts them. Rows "kept" are of processes that were told to keep it '
        "(`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_`, as `make fake-quant` and `make step-cost` do). "
        "Inputs shared: `share_inputs=True`, where the model has layers that read the same tensor. Input scale kept: "
        "`learn_input_scale=False`. Both of these are of the whole step; a dash: not measured in that run.",
        "",
        *head(
            *("model", "freed memory", "float step, ms", *FAKE_QUANT_WAYS, "bytes kept for backward"),
            "page faults of a step: float, eager, compiled",
        ),
    ]
    for found in runs:
        for model, step in found["training_step"].items():
            ratios, milliseconds = step["ratio_to_float"], 1000 * step["seconds"]["float"]
            kept = found["kept_for_backward"][model]["ratio"]
            told = [f"{ratios[way]:.2f}" if way in ratios else "-" for way in FAKE_QUANT_WAYS]
            cells = [f"{milliseconds:.0f}", *told, f"{kept:.2f}"]
            cells.append(", ".join(f"{step['page_faults'][way]:.0f}" for way in ("float", "eager", "compiled")))
            lines.append(row(model, freed_memory(found["setting"]), *cells))
    for found in runs:
        rows = ", ".join(found["training_step"])
        lines += ["", f"{rows}, freed memory {freed_memory(found['setting'])}: {conditions(found['setting'])}"]
    for found in runs:
        if found["layers"]:
            lines += layers(found)
    return "\n".join(lines) + "\n"


def accuracy_of_options(records: Sequence[dict[str, Any]]) -> str:
    """What options that make steps cheaper do to accuracy."""
    lines = [
        "## What cheaper options do to accuracy",
        "",
        "Written from `options` (`python -m benchmarks.accuracy.options.measure`): trained without the option and "
        "with it on each of the seeds, learning rate and radius as chosen without. Top-1 accuracy in percent; the "
        "difference in points with a 95 % interval; a row over all is their average, seed by seed.",
        "",
        *head("option", "task and bits", "first layer, head", "method", "seeds", "without", "with", "difference"),
    ]
    for found in records:
        seeds, edges = found["seeds"], found["first_last_bits"]
        option = "`" + ", ".join(f"{name}={value}" for name, value in found["fields"].items()) + "`"
        said = "as all" if edges is None else f"{edges} bits"
        gains: list[list[float]] = []
        for cell in found["accuracies"]:
            top1 = {way: dict(zip(seeds, values, strict=True)) for way, values in cell["top1"].items()}
            change = difference(top1["with"], top1["without"])
            assert change is not None
            gains.append(change.values)
            means = (f"{mean(values.values()):.2f}" for values in (top1["without"], top1["with"]))
            setting = cell["setting"].replace(":", ", W")
            lines.append(row(option, setting, said, cell["method"], str(len(seeds)), *means, str(change)))
        by_seed = [mean(values) for values in zip(*gains, strict=True)]
        average = Difference(by_seed, half_width(by_seed))
        lines.append(row(option, "all of these", said, "", str(len(seeds)), "", "", str(average)))
    return "\n".join(lines) + "\n"


def freed_memory(setting: dict[str, Any]) -> str:
    return "kept" if keeps_memory(setting["allocator"]) else "handed back"


def conditions(setting: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in setting["versions"].items() if v is not None)
    return (
        f"W{setting['bits']}A{setting['bits']}, one scale per tensor, batches of {setting['batch']}, "
        f"{setting['threads']} thread(s) on {setting['device']}, {setting['clock']} clock, medians of "
        f"{setting['repetitions']} interleaved repetitions of a step and three times as many of a layer; {versions}."
    )


def layers(found: dict[str, Any]) -> list[str]:
    kinds = list(dict.fromkeys(k for layer in found["layers"].values() for k in layer["ratio_to_float"]))
    lines = [
        "",
        f"Forward and backward of one layer, in the run with freed memory {freed_memory(found['setting'])}. A dash: "
        "the library has no such layer.",
        "",
        *head("layer", *kinds),
    ]
    for name, layer in found["layers"].items():
        ratios = layer["ratio_to_float"]
        lines.append(row(name, *(f"{ratios[k]:.2f}" if k in ratios else "-" for k in kinds)))
    return lines


def step_in_parts(found: dict[str, Any]) -> str:
    """Where the time of a float step and of a quantized one goes."""
    setting = found["setting"]
    lines = [
        "## A step in parts",
        "",
        f"Self time of operations under torch's profiler, in milliseconds: medians of {setting['repetitions']} steps "
        f"of each kind that took turns, batches of {setting['batch']}, W{setting['bits']}A{setting['bits']}, "
        f"{setting['threads']} thread(s) on {setting['device']}, kernels uncompiled. The profiler costs time itself: "
        f"read shares. `{FORWARD}` includes inputs that the backward pass quantizes again instead of keeping them.",
        "",
    ]
    for model, ways in found["milliseconds"].items():
        total = {way: sum(parts.values()) for way, parts in ways.items()}
        lines += head(model, "float", "quantized", "share of quantized")
        for part, after in ways["quantized"].items():
            before, share = ways["float"][part], after / total["quantized"]
            lines.append(row(part, f"{before:.0f}", f"{after:.0f}", f"{share:.0%}"))
        lines += [f"| all | {total['float']:.0f} | {total['quantized']:.0f} | |", ""]
    return "\n".join(lines)


def summary(steps: Sequence[dict[str, Any]]) -> str:
    """How the cost of the presets grows with model, batch and processes."""
    lines = [
        "## A step under some schedules, against a step of plain QAT",
        "",
        "`qat again` is plain QAT a second time: what it differs from 1 by is the error of measurement. Memory: peak "
        "of full SAQ beyond that of QAT, in units of the quantized weights.",
        "",
        *head("model", "batch", "processes", *PRESETS, "qat again", "memory"),
    ]
    for record in steps:
        a, outcome = record["arguments"], record["outcome"]
        times = outcome["times"]
        cells = [f"{times[way]['ratio']:.2f}" if way in times else "-" for way in (*SUMMARY, "qat again")]
        more = f"{more_memory(outcome, 'full'):+.2f}" if "full" in outcome["bytes"] else "-"
        lines.append(row(a["model"], str(a["batch_size"]), str(a["processes"]), *cells, more))
    return "\n".join(lines) + "\n"


def more_memory(outcome: dict[str, Any], way: str) -> float:
    """Peak beyond that of QAT, in units of the quantized weights."""
    return (outcome["bytes"][way] - outcome["bytes"][QAT]) / outcome["quantized_weight_bytes"]


def one(record: dict[str, Any]) -> str:
    """Every way to train that one run has measured."""
    a, outcome = record["arguments"], record["outcome"]
    lines = [
        f"### {a['model']}, batches of {a['batch_size']}"
        + (f", {a['processes']} processes" if a["processes"] > 1 else ""),
        "",
        f"W{a['bits']}A{a['bits']}, {a['rounds']} rounds over all ways to train, {a['clock']} clock, "
        f"{outcome['threads']} thread(s) each, {outcome['device_name']}, freed memory {freed_memory(outcome)}, "
        f"{outcome['seconds_of_qat'] * 1000:.0f} ms "
        "for a step of QAT. Median over rounds of the ratio to QAT in the same round, and quartiles; peak memory "
        "beyond that of QAT, in units of the quantized weights. The trigger is timed with every second step firing. "
        f"Commit {record['versions'].get('commit', 'unknown')}.",
        "",
        *head("way to train", "time", "quartiles", "more memory"),
    ]
    for way, t in outcome["times"].items():
        quartiles = f"{t['lower_quartile']:.2f} to {t['upper_quartile']:.2f}"
        lines.append(row(way, f"{t['ratio']:.2f}", quartiles, f"{more_memory(outcome, way):+.2f}"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

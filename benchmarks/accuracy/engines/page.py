"""docs/engine_accuracy.md, made of stored results and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...shared.markdown import head, row
from ...shared.runs import records_in, versions_of
from ..tasks import TASKS

MODULE = "benchmarks.accuracy.engines.measure"
FIRST = 300
"""Test images whose accuracy is stored apart."""
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
EXACT = "onnxruntime-exact-bias"
"""ONNX Runtime as `ExportedClassifier.from_pretrained(exact=True)` runs it."""
PLACES = {"here": "VNNI", "no-vnni": "no VNNI"}
ALLOWED = 0.5
"""Percentage points that an engine's accuracy may differ by from that of hf_saq."""


def page(results: Path) -> str:
    """docs/engine_accuracy.md from the runs stored in `results`."""
    records = {record["name"]: record for record in records_in(results)}
    models = [name.removesuffix("-hf_saq") for name in records if name.endswith("-hf_saq")]
    if not models:
        raise ValueError(f"{results} has no run of hf_saq itself; run `make engine-accuracy`.")
    own = {name: records[f"{name}-hf_saq"] for name in models}
    arguments = own[models[0]]["arguments"]
    text = [
        "# Accuracy on other engines",
        f"Written by `python -m {MODULE}` from `{results.as_posix()}`; not edited by hand.",
        f"Models fine-tuned on Oxford Flowers-102, exported with `export_onnx` and run on {arguments['images']} test "
        f"images. 8-bit weights are calibrated only; 4-bit weights are trained for {arguments['steps']} steps with "
        "plain quantization-aware training. Top-1 in percent; in brackets the difference to hf_saq on the same "
        "images, in points, with half of its 95 % interval.",
        "\n".join(_table(records, own, "cpu")),
        _summary(records, own),
        "## A CPU without VNNI",
        _without(records),
        "\n".join(_table(records, own, "cpu-vnni")),
        "## What was exported",
        "\n".join(_exports(records, own)),
        "## The models",
        "\n".join(f"- {TASKS[task].title}: {TASKS[task].description}" for task in _tasks(own)),
        f"Versions: {'; '.join(versions_of(own.values()))}.",
    ]
    return "\n\n".join(part for part in text if part) + "\n"


def _tasks(own: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(record["arguments"]["task"] for record in own.values()))


def _title(record: dict[str, Any]) -> str:
    quantization = record["arguments"]["quantization"]
    bits = f"W{quantization['weight_bits']}A{quantization['activation_bits']}"
    return f"{TASKS[record['arguments']['task']].title.split(', ')[-1]}, {bits}"


def _named(run: dict[str, Any]) -> str:
    """A run in words: the model, and where it has run if it was not in hf_saq itself."""
    a = run["arguments"]
    if "engine" not in a:
        return _title(run)
    engine = f"{ENGINES['onnxruntime']}, exact" if a["engine"] == EXACT else ENGINES[a["engine"]]
    return f"{_title(run)} in {engine}, {PLACES[a['place']]}"


def _runs(records: dict[str, Any], name: str, target: str) -> dict[tuple[str, str], dict[str, Any]]:
    keys = {(engine, place): f"{name}-{target}-{engine}-{place}" for engine in ENGINES for place in PLACES}
    return {key: records[run] for key, run in keys.items() if run in records}


def _table(records: dict[str, Any], own: dict[str, Any], target: str) -> list[str]:
    columns = [f"{ENGINES[engine]}, {PLACES[place]}" for place in PLACES for engine in ENGINES]
    columns += [f"{ENGINES['onnxruntime']}, exact, {where}" for where in PLACES.values()]
    rows = []
    for name, record in own.items():
        runs = _runs(records, name, target)
        if runs:
            cells = [_cell(runs.get((engine, place))) for place in PLACES for engine in ENGINES]
            cells += [_cell(records.get(f"{name}-{target}-{EXACT}-{place}")) for place in PLACES]
            cells.insert(0, _cell(records.get(f"{name}-float64")))
            top1 = record["outcome"]
            rows.append(row(_title(record), f"{100 * top1['float']:.1f}", f"{100 * top1['top1']:.1f}", *cells))
    return [*head("model", "float", "hf_saq", "hf_saq in float64", *columns), *rows]


def _cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return "not run"
    outcome = run["outcome"]
    return f"{100 * outcome['top1']:.1f} ({_points(outcome):+.2f} ± {100 * outcome['margin']:.2f})"


def _points(outcome: dict[str, Any]) -> float:
    return round(100 * (outcome["top1"] - outcome["hf_saq"]), 6)


def _summary(records: dict[str, Any], own: dict[str, Any]) -> str:
    runs = [run for name in own for run in _runs(records, name, "cpu").values()]
    lines = [f'With `target="cpu"`, {_verdict(runs)}. {_seen(runs)} {_on_the_first(runs)}']
    openvino = [run for run in runs if run["arguments"]["engine"] == "openvino"]
    chosen, exactly = list(openvino), list(openvino)
    for name in own:
        wants_exact = records.get(f"{name}-cpu-export", {}).get("outcome", {}).get("exact")
        for place in PLACES:
            rounded, exact = (records.get(f"{name}-cpu-{engine}-{place}") for engine in ("onnxruntime", EXACT))
            chosen += [run for run in [exact if wants_exact else rounded] if run]
            exactly += [run for run in [exact] if run]
    if len(exactly) > len(openvino):
        lines.append(f"\nAs `ExportedClassifier` loads them, {_verdict(chosen)}. {_on_the_first(chosen)}")
        lines.append(
            f"\nWith OpenVINO, and with ONNX Runtime by `exact=True`, {_verdict(exactly)}. {_on_the_first(exactly)}"
        )
    floor = [record for name in own if (record := records.get(f"{name}-float64")) and "first" in record["outcome"]]
    if floor:
        lines.append(
            f"\nhf_saq itself in float64 instead of float32, on all images: {_verdict(floor)}. {_on_the_first(floor)}"
        )
    lines.append("\nImages whose class is that of hf_saq, in percent:")
    for name, record in own.items():
        same = {
            ENGINES[e]: f"{100 * run['outcome']['same']:.1f}" for (e, _), run in _runs(records, name, "cpu").items()
        }
        one = records.get(f"{name}-cpu-{EXACT}-here")
        if one is not None:
            same["ONNX Runtime, exact"] = f"{100 * one['outcome']['same']:.1f}"
        if same:
            lines.append(f"- {_title(record)}: {', '.join(f'{engine} {share}' for engine, share in same.items())}")
    lines.append(
        "\nONNX Runtime rounds the bias of an integer convolution to the product of its two scales "
        "(`WeightBiasQuantization`). With few bits that is a part of a step, roundings behind it flip, and what they "
        "flip grows from layer to layer until many images are seen otherwise: some better, some worse. Without that "
        "optimizer (`exact=True`, which `ExportedClassifier` chooses where the export found it to be needed) biases "
        "stay in float, and so do convolutions: [deploy.md](deploy.md)."
    )
    return "\n".join(lines)


def _verdict(runs: list[dict[str, Any]], where: str | None = None) -> str:
    """Say how many of `runs` are near hf_saq, and which are not; `where` names a part of an outcome."""
    far = [
        _named(run)
        for run in runs
        if abs(_points(run["outcome"] if where is None else run["outcome"][where])) > ALLOWED
    ]
    if not far:
        return f"all {len(runs)} runs are within {ALLOWED} points of hf_saq"
    return f"{len(runs) - len(far)} of {len(runs)} runs are within {ALLOWED} points of hf_saq; not {'; '.join(far)}"


def _seen(runs: list[dict[str, Any]]) -> str:
    differ = [_named(run) for run in runs if abs(_points(run["outcome"])) > 100 * run["outcome"]["margin"]]
    if not differ:
        return "No difference is larger than its interval."
    return f"Differences larger than their interval: {'; '.join(differ)}."


def _on_the_first(runs: list[dict[str, Any]]) -> str:
    return f"On the first {FIRST} images alone, {_verdict(runs, 'first')}."


def _without(records: dict[str, Any]) -> str:
    said = []
    for name, probe in records.items():
        if not name.startswith("saturation-") or probe["arguments"]["engine"] not in ENGINES:
            continue
        engine, place, found = probe["arguments"]["engine"], probe["arguments"]["place"], probe["outcome"]
        verb = "saturates" if found["saturates"] else "is exact"
        sums = f"{found['found']:,.0f} of {found['expected']:,.0f}"
        said.append(f"- {ENGINES[engine]}, {PLACES[place]}: a sum of the largest products {verb}, {sums}")
    return (
        "The CPU of these runs has VNNI. Without it, in these columns, the CPU is the same, and the instruction by "
        "which engines ask for its features (CPUID) leaves out AVX-512, VNNI and AMX, so that they run their code for "
        "AVX2 (`benchmarks/accuracy/engines/without_vnni.c`):\n\n"
        + "\n".join(said)
        + '\n\nWith `target="cpu-vnni"` nothing is split, and a CPU without VNNI gets it wrong:'
    )


def _exports(records: dict[str, Any], own: dict[str, Any]) -> list[str]:
    rows = []
    for name, record in own.items():
        for target in ("cpu", "cpu-vnni"):
            export = records.get(f"{name}-{target}-export")
            if export is not None:
                found = export["outcome"]
                integers = found["checks"].get("integers", "").split(" layers run")[0] or "not counted"
                sizes = [f"{found[kind] / 1e6:.2f} MB" for kind in ("bytes", "int4_bytes")]
                cells = [*sizes, f"{len(found['split'])}", integers]
                verified = [found["refused"] or "passed", "needed" if found.get("exact") else "-"]
                rows.append(row(_title(record), f"`{target}`", *cells, *verified))
    return [
        *head(
            "model",
            "target",
            "file, int8",
            "file, int4",
            "layers in two halves",
            "in integers",
            "verification",
            "exact",
        ),
        *rows,
    ]

"""Say where the time of an exported model goes: its operators in ONNX Runtime, beside those of the float model.

    python -m benchmarks.deploy.operators      # what `make deploy-operators` runs

Both graphs run under the engine's profiler and take turns. Writes a table into docs/deploy.md.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_saq.timing.forms import FORMS, StoredForms
from hf_saq.timing.machine import machine, versions
from hf_saq.timing.nodes import NodeTimes, time_nodes

from ..shared.command_line import parsed
from ..shared.markdown import head, row, write_between
from ..shared.places import RESULTS
from ..shared.runs import Runs
from .models import IMAGE_SIZE, MODELS, save_quantized

BEGIN, END = "<!-- written by make deploy-operators -->", "<!-- end of what make deploy-operators wrote -->"
GRAPHS = ("onnx-float", "onnx-int8")
SHOWN = 0.01
"""Operators with a smaller share of the time of both graphs are added up."""


@dataclass
class Options:
    """What is profiled."""

    model: str = field(default="vit-tiny", metadata={"help": f"one of {', '.join(MODELS)}"})
    rounds: int = field(default=10, metadata={"help": "how often both graphs take turns"})
    results: Path = field(default=Path(RESULTS) / "deploy_operators", metadata={"help": "where outcomes are stored"})
    document: Path = field(default=Path("docs/deploy.md"), metadata={"help": "the page that the table is written to"})


def main(argv: Sequence[str] | None = None) -> None:
    options, command = parsed(Options, argv, "benchmarks.deploy.operators", __doc__)
    arguments = {"model": options.model, "rounds": options.rounds}
    record = Runs(options.results, command).once(
        options.model, arguments, lambda: profiled(options.model, options.rounds)
    )
    write_between(options.document, BEGIN, END, table(options.model, record["outcome"]))


def profiled(name: str, rounds: int) -> dict[str, Any]:
    """Profile both graphs of the model `name`, one image at a time on one thread."""
    with tempfile.TemporaryDirectory() as directory:
        source, stage = Path(directory) / "model", Path(directory) / "stage"
        source.mkdir()
        stage.mkdir()
        save_quantized(name, source)
        stored = StoredForms(str(source), stage, "cpu")
        images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
        contents = {form: graph_file(stored.write(FORMS[form], images)[0]).read_bytes() for form in GRAPHS}
        times = time_nodes(contents, images[:1].numpy(), stage, rounds=rounds)
    return {
        "operators": {form: by_operator(found) for form, found in times.items()},
        "machine": machine(),
        "versions": versions(),
    }


def graph_file(path: Path) -> Path:
    return path if path.is_file() else next(path.rglob("*.onnx"))


def by_operator(found: NodeTimes) -> dict[str, dict[str, float]]:
    """Add up the times of nodes by what they are: milliseconds, the median over turns, and how many nodes."""
    kinds = {node.name: node.op_type for node in found.nodes}
    turns: dict[str, list[float]] = {kind: [] for kind in kinds.values()}
    for turn in found.turns:
        spent: dict[str, float] = defaultdict(float)
        for name, ns in turn.items():
            spent[kinds[name]] += ns
        for kind in turns:
            turns[kind].append(spent[kind] / 1e6)
    counts = Counter(kinds.values())
    return {kind: {"ms": statistics.median(of_kind), "nodes": counts[kind]} for kind, of_kind in turns.items()}


def table(name: str, outcome: Mapping[str, Any]) -> str:
    """Show the operators of both graphs, those that take longest in the integer one first."""
    found = [outcome["operators"][form] for form in GRAPHS]
    totals = [sum(entry["ms"] for entry in operators.values()) for operators in found]
    kinds = sorted(
        set(found[0]) | set(found[1]),
        key=lambda kind: [-operators.get(kind, {"ms": 0})["ms"] for operators in found[::-1]],
    )
    shown = [
        kind
        for kind in kinds
        if any(of.get(kind, {"ms": 0})["ms"] > SHOWN * total for of, total in zip(found, totals, strict=True))
    ]
    rows = [row(kind, *(_cell(operators.get(kind)) for operators in found)) for kind in shown]
    others = [sum(e["ms"] for kind, e in operators.items() if kind not in shown) for operators in found]
    rows.append(row("others", *(f"{ms:.2f}" for ms in others)))
    rows.append(row("all", *(f"{ms:.2f}" for ms in totals)))
    engine = outcome["versions"].get("onnxruntime", "?")
    told = (
        f"Milliseconds of the operators of {name} in ONNX Runtime {engine} on {outcome['machine']['cpu']}, one image, "
        "one thread, by the engine's profiler, both graphs in turns; in brackets how many nodes. All of them take "
        f"{totals[1] / totals[0]:.2f} of float's time in integers."
    )
    return "\n".join([told, "", *head("operator", *GRAPHS), *rows])


def _cell(entry: Mapping[str, float] | None) -> str:
    return "-" if entry is None else f"{entry['ms']:.2f} ({entry['nodes']:.0f})"


if __name__ == "__main__":
    main()

"""The table that a run of the example script ends with, and what is written beside the models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_saq.hub import ResultRow

NAMES = {"float": "float", "qat": "QAT", "saq": "SAQ"}
"""Method -> its name in model cards."""


@dataclass
class Row:
    """One line of the final table."""

    method: str
    bits: str
    top1: float
    bytes: int
    seconds: float | None
    reloaded_top1: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    engine_top1: float | None = None

    def for_card(self) -> ResultRow:
        """As a line in the model card of another model of the same run."""
        return ResultRow(NAMES[self.method], self.bits, self.metrics, self.bytes)


def weight_bytes(directory: Path) -> int:
    """Size of the weight files in a saved model."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def format_table(rows: list[Row], engine: str = "") -> str:
    has_engine = any(row.engine_top1 is not None for row in rows)
    head = ["method", "bits", "top-1 %", "weights on disk", "seconds", "reloaded top-1 %"]
    cells = [[*head, f"{engine} top-1 %"] if has_engine else head]
    for row in rows:
        line = [row.method, row.bits, _percent(row.top1), f"{row.bytes / 1024:,.1f} KiB"]
        line += ["-" if row.seconds is None else f"{row.seconds:.1f}", _percent(row.reloaded_top1)]
        cells.append([*line, _percent(row.engine_top1)] if has_engine else line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def write_results(rows: list[Row], output: Path, engine: str = "") -> str:
    """Write `results.txt` and `results.json` into `output`; returns the table, with a column of the `engine`."""
    table = format_table(rows, engine)
    (output / "results.txt").write_text(table + "\n")
    (output / "results.json").write_text(json.dumps([row.__dict__ for row in rows], indent=2) + "\n")
    return table


def save_results(trainer: Any, metrics: dict[str, float]) -> None:
    """Write `eval_results.json` beside the model, with the number of images, which `hf-saq card` tells."""
    trainer.save_metrics("eval", {**metrics, "eval_samples": len(trainer.eval_dataset)})


def what_to_do_next(rows: list[Row], output: Path, is_pushed: bool) -> str:
    """Say in words what came out, where it lies and how to use it."""
    quantized = [row for row in rows if row.method != "float"]
    best = max(quantized, key=lambda row: row.top1)
    directory = output / f"{best.method}-{best.bits.lower()}"
    lines = [
        f"Best quantized model: {NAMES[best.method]} {best.bits}, {100 * best.top1:.2f} % top-1 "
        f"({100 * (best.top1 - rows[0].top1):+.2f} to float), {best.bytes / rows[0].bytes:.1%} of the float bytes.",
        f"It lies in {directory}, with its image processor and a card (README.md); all results in {output}.",
        "Load it:   import hf_saq; from transformers import pipeline; "
        f'pipeline("image-classification", model="{directory}")',
    ]
    if best.engine_top1 is None:
        lines.append(f"Export it: hf-saq export {directory} OUT (integers for ONNX Runtime, OpenVINO, a browser)")
    if is_pushed:
        return "\n".join([*lines, "All quantized models were pushed to the Hub."])
    return "\n".join([*lines, f"Look at it: hf-saq inspect {directory}", "Push it:   run again with --push_to_hub"])

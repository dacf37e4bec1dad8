"""docs/quantizers.md, made from the stored results of `quantizer_table.py` and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

FLOAT = "float"


def page(results: Path) -> str:
    """The page on the results in the directory `results`."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    runs = [record for record in records if record["arguments"]["kind"] == "run"]
    return "# Quantizers\n\n" + table(runs)


def table(runs: list[dict[str, Any]]) -> str:
    """One row for each quantizer, one column for each number of bits: top-1 after the fine-tune (before it)."""
    bits = sorted({run["arguments"]["bits"] for run in runs} - {32}, reverse=True)
    lines = ["| quantizer | " + " | ".join(f"W{b}A{b}" for b in bits) + " |", "|---" * (len(bits) + 1) + "|"]
    for quantizer in dict.fromkeys(run["arguments"]["quantizer"] for run in runs):
        cells = []
        for width in [32] if quantizer == FLOAT else bits:
            own = [
                r["outcome"]
                for r in runs
                if (r["arguments"]["quantizer"], r["arguments"]["bits"]) == (quantizer, width)
            ]
            cells.append(
                f"{mean(o['test'] for o in own):.2%} ({mean(o['test_calibrated'] for o in own):.1%})" if own else "-"
            )
        lines.append(f"| {quantizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

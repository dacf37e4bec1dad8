"""The blocks of docs/analysis.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

from hf_saq.analysis import Allocation, Landscape, LatencyTable, Sensitivity, Sharpness
from hf_saq.timing.nodes import turns

PAGE = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()


def test_the_page_runs(capsys, monkeypatch):
    monkeypatch.setattr(turns, "SECONDS", 0.0)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    kinds = {"found": Sharpness, "line": Landscape, "layers": Sensitivity, "bits": Allocation}
    kinds |= {"latencies": LatencyTable, "fast": Allocation}
    assert all(isinstance(names[name], kind) for name, kind in kinds.items())
    assert all(names[name].cost <= names[name].budget for name in ("bits", "fast"))
    printed = capsys.readouterr().out
    for row in ("steepest", "adaptive", "one direction", "random", "largest eigenvalue"):
        assert row in printed and f"| {row}" in PAGE
    assert "predictions agree" in printed and "oscillating_weights" in printed

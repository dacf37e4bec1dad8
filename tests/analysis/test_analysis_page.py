"""The blocks of docs/analysis.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

from hf_saq.analysis import Allocation, Landscape, Sensitivity, Sharpness

PAGE = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()


def test_the_page_runs(capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    kinds = {"found": Sharpness, "line": Landscape, "layers": Sensitivity, "bits": Allocation}
    assert all(isinstance(names[name], kind) for name, kind in kinds.items())
    assert names["bits"].cost <= names["bits"].budget
    printed = capsys.readouterr().out
    for row in ("steepest", "adaptive", "one direction", "random", "largest eigenvalue"):
        assert row in printed and f"| {row}" in PAGE
    assert "predictions agree" in printed and "oscillating_weights" in printed

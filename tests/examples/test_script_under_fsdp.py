"""The example script under FSDP2: one model a stage, each from the float model that was stored."""

from __future__ import annotations

import json

import pytest
from processes import SUPPORT, run_python


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_python(SUPPORT / "fsdp_script_worker.py", tmp_path)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["float", "qat", "saq"]
    for row in rows[1:]:
        assert row["reloaded_top1"] == pytest.approx(row["top1"], abs=1e-12)  # 48 images: the smallest step is 0.02
        assert 4 * row["bytes"] < rows[0]["bytes"]
    assert not list((tmp_path / "out").glob("*-reloaded"))

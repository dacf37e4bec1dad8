"""Stored runs once more."""

from __future__ import annotations

import json

import pytest

from benchmarks.accuracy import quick as quick_script
from benchmarks.accuracy import sweep as script
from benchmarks.accuracy.methods import QAT, SAQ


def test_repeating_stored_runs(tiny, tmp_path, capsys):
    """The same numbers on the same machine; stored ones that they cannot come near are noticed."""
    script.main([*tiny, "--methods", QAT, SAQ])
    quick = ["--settings", "digits:2", "--seeds", "0", "1", "--processes", "1", "--results", str(tmp_path / "results")]
    assert quick_script.main(quick) == 0
    assert capsys.readouterr().out.count("2 of 2 equal   ok") == 2
    for path in (tmp_path / "results").glob("digits-w2-case-3-seed*.json"):
        moved = json.loads(path.read_text())
        moved["outcome"]["test"] += 0.5
        path.write_text(json.dumps(moved))
    assert quick_script.main(quick) == 1
    with pytest.raises(ValueError, match=r"no stored runs of \{'qat': \[5\], 'case 3': \[5\]\}"):
        quick_script.main([*quick, "--seeds", "1", "5"])
    with pytest.raises(ValueError, match="no stored runs of digits at 4 bits"):
        quick_script.main([*quick, "--settings", "digits:4"])
    with pytest.raises(ValueError, match="--settings digits: expected a task and its bits, such as digits:2"):
        quick_script.main(["--settings", "digits"])

"""Lengths of plain QAT: what runs, what is stored, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from benchmarks.accuracy import convergence as script
from benchmarks.accuracy import study
from benchmarks.accuracy.tasks import TASKS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.fixture
def given(tiny, tmp_path):
    kept = [*("--results", str(tmp_path / "results")), *("--cache", str(tmp_path / "cache"))]
    return ["--task", "digits", "--bits", "2", "--seeds", "100", "101", *kept]


def test_runs_are_those_of_the_sweep_but_for_their_length(given, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train_one", lambda a, paths: {"validation": 0.5, "steps": a["steps"]})
    script.main([*given, "--steps", "2", "3"])
    paths = list((tmp_path / "results").iterdir())
    assert {p.stem for p in paths} == {f"digits-w2-steps{n}-lr0.004-seed{s}" for n in (2, 3) for s in (100, 101)}
    record = json.loads(paths[0].read_text())
    assert record["outcome"]["steps"] in (2, 3) and record["arguments"]["kind"] == "trial"
    # Steps of the task may change: what is stored stays valid.
    monkeypatch.setitem(TASKS, "digits", dataclasses.replace(TASKS["digits"], steps=2))
    monkeypatch.setattr(study, "train_one", lambda *a: pytest.fail("trained again"))
    script.main([*given, "--steps", "2", "3"])


def test_each_length_at_its_best_rate(given, tmp_path, monkeypatch, capsys):
    """3 and 6 steps 80.0 and 80.5 %, the second at another rate; 12 steps only 0.1 points more."""
    table = {(3, 1e-3): 0.80, (3, 2e-3): 0.70, (6, 1e-3): 0.75, (6, 2e-3): 0.805, (12, 1e-3): 0.806, (12, 2e-3): 0.8}
    monkeypatch.setattr(study, "train_one", lambda a, paths: {"validation": table[a["steps"], a["lr"]]})
    script.main([*given, "--learning_rates", "1e-3", "2e-3"])
    said = capsys.readouterr().out
    assert "| 3 | 0.001 | 80.00 | - |\n| 6 | 0.002 | 80.50 | +0.50 [" in said
    assert "| 12 | 0.001 | 80.60 | +0.10 [" in said
    assert "More steps bring less than 0.3 points: 6 steps are enough." in said


def test_mistakes(given):
    with pytest.raises(ValueError, match=r"--seeds \[5\]: expected 100 and more"):
        script.main([*given, "--seeds", "5"])
    with pytest.raises(ValueError, match=r"--tasks \['imagenet'\]: unknown"):
        script.main([*given, "--task", "imagenet"])


def test_what_the_protocol_says_of_lengths_is_stored():
    def validation(pattern: str) -> float:
        found = [json.loads(path.read_text())["outcome"]["validation"] for path in RESULTS.glob(pattern)]
        assert found, pattern
        return 100 * statistics.mean(found)

    text = " ".join((RESULTS.parents[1] / "docs" / "protocol.md").read_text().split())
    few, many = (validation(f"convergence/flowers-vit-w4-steps{n}-lr0.0003-seed100.json") for n in (240, 480))
    assert f"240 steps reach {few:.1f} %, 480 at the same rate {many:.1f} %" in text
    few = validation("accuracy/flowers-vit-w3-qat-seed?.json")
    many = validation("convergence/flowers-vit-w3-steps480-lr0.0002-seed100.json")
    assert f"480 reach {many:.1f} % where the reported runs with 240 have {few:.1f} %" in text

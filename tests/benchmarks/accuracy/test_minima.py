"""The minima of the accuracy benchmark: a tiny run of both scripts and its page, and what the findings compute."""

from __future__ import annotations

import json
import math

import pytest
from scipy.stats import spearmanr

from benchmarks.accuracy.methods import QAT, SAQ
from benchmarks.accuracy.minima import bit_budget, flatness, page
from benchmarks.accuracy.minima.findings import Minima, minima_of
from benchmarks.accuracy.minima.page import answer


def record(seed: int, steepest: float, test: float, method: str = QAT) -> dict:
    rise = {"mean": steepest}
    sharpness = {"loss": 0.1, "steepest": rise, "adaptive": rise, "random": rise, "eigenvalue": 1.0, "trace": -1.0}
    arguments = {"kind": "run", "task": "digits", "bits": 2, "method": method, "seed": seed}
    return {"name": "x", "arguments": arguments, "outcome": {"sharpness": sharpness, "test": test}}


@pytest.fixture
def minima() -> Minima:
    """SAQ is half as sharp and two points better on every seed."""
    records = [record(s, 0.2 + 0.1 * s, 0.80 - 0.01 * s) for s in range(4)]
    records += [record(s, 0.1 + 0.05 * s, 0.82 - 0.01 * s, SAQ) for s in range(4)]
    return minima_of(records)[0]


def test_ratios_and_correlations(minima):
    ratio = minima.ratio(SAQ, "steepest rise")
    assert math.exp(ratio.mean) == pytest.approx(0.5) and ratio.sign == -1
    assert minima.ratio(SAQ, "trace") is None  # a ratio needs positive values
    assert minima.within_seeds("steepest rise").values == [pytest.approx(1.0)] * 4
    assert minima.within_seeds("largest eigenvalue") is None  # all alike: no ranks
    whole, low, high = minima.over_all("steepest rise")
    points = [p for seed in range(4) for p in minima.points(seed, "steepest rise")]
    assert whole == pytest.approx(spearmanr(*zip(*points, strict=True)).statistic) and low <= whole <= high


def test_yes_or_no():
    assert answer([-1, -1]).startswith("**yes**; flatter in 2 of 2 tasks")
    assert answer([-1, 0, 1]).startswith("**not everywhere**; flatter in 1 of 3 tasks, sharper in 1, no difference")
    assert answer([0, 1]).startswith("**no**; flatter in 0 of 2")


@pytest.mark.slow
def test_both_scripts_and_the_page(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(flatness, "POINTS", 3)
    common = [*tiny[tiny.index("--results") :], "--settings", "digits:2", "--seeds", "0", "1"]
    flatness.main([*common, "--trials", str(tmp_path / "none"), "--methods", QAT, SAQ])
    bit_budget.main([*common, "--trials", str(tmp_path / "none")])
    stored = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    for seed in (0, 1):
        allocation = stored[f"digits-w2-allocation-seed{seed}"]["outcome"]
        assert allocation["cost"] <= allocation["budget"] == allocation["cost_before"]
        mixed = stored[f"digits-w2-qat-bits-by-budget-seed{seed}"]
        assert mixed["arguments"]["quantization"]["overrides"] == allocation["overrides"]
        uniform = stored[f"digits-w2-qat-seed{seed}"]
        assert uniform["outcome"]["float_model"] == mixed["outcome"]["float_model"]
        assert uniform["outcome"]["sharpness"]["steepest"]["mean"] > 0
    document = tmp_path / "docs" / "flatness.md"
    page.write_page(tmp_path / "results", document)
    text = document.read_text()
    assert "Does flatness predict accuracy?" in text and "the bit operations of W2A2 | 2 |" in text
    for name in ("landscape", "flatness_digits", "flatness_ratios", "flatness_accuracy"):
        assert "prefers-color-scheme: dark" in (document.parent / f"{name}.svg").read_text()

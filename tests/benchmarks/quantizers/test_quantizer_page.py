"""The page on quantizers, from records by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.quantizers.page import page


def record(kind, name, outcome, **arguments):
    return {
        "name": name,
        "arguments": {"kind": kind, **arguments},
        "outcome": outcome,
        "seconds": 30.0,
        "versions": {"torch": "1"},
        "command": "python -m benchmarks.quantizers.sweep",
    }


def test_the_page_by_hand(tmp_path):
    """Two seeds of one quantizer: mean and range; a quantizer that is missing at one width: a dash."""
    training = {"lr": 0.01, "steps": 5, "batch_size": 4, "weight_decay": 1e-4}
    adapted = {"test_before": 0.81, "test_after": 0.8512, "training_loss": 0.1, "fingerprint": "f"}
    records = [record("adaptation", "a", adapted, test_images=10000, validation_images=7, **training)]
    for name, bits, seed, test in (("lsq", 4, 0, 0.8), ("lsq", 4, 1, 0.82), ("lsq", 2, 0, 0.7), ("pact", 4, 0, 0.6)):
        outcome = {
            "test": test,
            "test_calibrated": test - 0.3,
            "training_loss": 0.5,
            "learned_values": {"x.weight_quantizer.scale": [2.0, 3.0], "x.activation_quantizer.scale": [1.0, 0.5]},
        }
        own = {"quantizer": name, "bits": bits, "seed": seed, "calibrated_images": 1000, "test_images": 5000}
        records.append(record("run", f"{name}{bits}{seed}", outcome, **own, **training))
    float_run = {"test": 0.86, "test_calibrated": 0.85, "training_loss": 0.1, "learned_values": {}}
    own = {"quantizer": "float", "bits": 32, "seed": 0, "calibrated_images": 1000, "test_images": 5000}
    records.append(record("run", "float", float_run, **own, **training))
    records.append(record("trial", "t", {"validation": 0.9}, quantizer="lsq", bits=2, seed=0, **training))
    fit = {"lsq-4": {"error": 0.02, "outermost": 0.125}, "lsq-2": {"error": 0.18, "outermost": 0.25}}
    records.append(record("grids", "g", fit, quantizers=["lsq"], bits=[4, 2]))
    for entry in records:
        (tmp_path / f"{entry['name']}.json").write_text(json.dumps(entry))
    text = page(tmp_path)
    assert "| quantizer | W4A4 | W2A2 |" in text
    assert "| lsq | 81.0 [80.0, 82.0] (51.0 [50.0, 52.0]) | 70.0 (40.0) |" in text
    assert "| pact | 60.0 (30.0) | - |" in text
    assert "has 81.00% on all 10,000 as it comes and 85.12% after" in text
    assert "to 86.00%: that is what" in text
    assert "standard error of such a figure is at most 0.7 points" in text  # sqrt(0.6 * 0.4 / 5000)
    assert "Seeds: 0, 1." in text
    assert "| lsq | **90.0** |" in text
    assert "| lsq | 0.020 (12.5%) | 0.180 (25.0%) |" in text
    assert "torch 1; the commit" in text
    assert "lsq, pact: the smallest rate" in text.replace("float, ", "")
    assert "Of 8 that moved at all, 0 ended within 5%" in text
    assert "| lsq | 4 | 1.50 1.50 1.50 | 0.50 0.50 0.50 | 0.50 |" in text


def test_a_page_without_results(tmp_path):
    with pytest.raises(ValueError, match="found 0 results; expected one adaptation and at least one run"):
        page(tmp_path)

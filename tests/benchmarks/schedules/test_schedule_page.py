"""The page on schedules, from records by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.schedules import sweep as script
from benchmarks.schedules.page import preset_methods, write_page
from benchmarks.schedules.rows import relative_cost, table_rows
from benchmarks.shared.schedule_variants import VARIANTS

TIMES = {"full": 1.9, "previous": 1.04, "trigger": 1.45, "interval 5": 1.2}


def test_costs_that_follow_from_others():
    times = {way: {"ratio": ratio} for way, ratio in TIMES.items()}
    assert relative_cost("full", {}, times, 1.0) == 1.9
    assert relative_cost("start 0.5", {"start": 0.5}, times, 0.5) == pytest.approx(1.45)
    assert relative_cost("trigger", {"trigger": True}, times, 0.2) == pytest.approx(1 + 0.2 * 0.9)
    assert relative_cost("qat", {"case": None}, None, 0.0) == 1.0
    assert relative_cost("full", {}, None, 1.0) is None and relative_cost("look 5", {}, times, 0.2) is None


def test_presets_are_among_what_is_compared():
    assert preset_methods()["full"] == "full"
    assert preset_methods()["free"] == "echo 2" and preset_methods()["last_layers"] == "last eighth"
    assert set(preset_methods()) == {"full", "balanced", "last_layers", "free"}


def record(method, seed, test, share=0.0, epochs=10):
    config = VARIANTS["qat" if method not in VARIANTS else method]
    arguments = {"kind": "run", "method": method, "config": config, "seed": seed, "lr": 0.01, "epochs": epochs}
    arguments |= {"pool": 450, "images": 300, "float_epochs": 5, "float_learning_rate": 0.001}
    outcome = {"test": test, "float_test": 0.95, "perturbed_share": share, "steps": 100, "cpu_seconds": 60.0}
    arguments["rho"] = None if config.get("case", 3) is None else 0.2
    return {"name": f"{method}-{seed}", "arguments": arguments, "outcome": outcome, "versions": {"torch": "1"}}


def write(tmp_path, gains, times=True):
    """Plain QAT at 80, 81 and 82 %, the others above it by `gains` of each seed, in points."""
    (tmp_path / "runs").mkdir()
    for seed in range(3):
        base = 0.80 + seed / 100
        records = [record("qat", seed, base), record(script.LONGER, seed, base, epochs=20)]
        records += [record(method, seed, base + g[seed] / 100, 1.0) for method, g in gains.items()]
        for r in records:
            (tmp_path / "runs" / f"{r['name']}.json".replace(" ", "")).write_text(json.dumps(r))
    if times:
        ways = {"qat": 1.0, **TIMES}
        outcome = {
            "times": {w: {"ratio": t, "lower_quartile": t, "upper_quartile": t} for w, t in ways.items()},
            "bytes": {w: 100 if w == "qat" else 130 for w in ways},
            "quantized_weight_bytes": 40,
            "seconds_of_qat": 0.05,
            "threads": 1,
            "device_name": "cpu",
        }
        cost = {"arguments": {"model": "m", "batch_size": 8, "bits": 4, "rounds": 3, "clock": "process"}}
        cost |= {"outcome": outcome, "versions": {"torch": "1"}}
        (tmp_path / "cost.json").write_text(json.dumps(cost))
    write_page(tmp_path / "runs", tmp_path / "cost.json", tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


def test_the_page_by_hand(tmp_path):
    text = write(tmp_path, {"full": [2.0, 2.1, 1.9], "previous": [1.9, 1.9, 1.9], "interval 5": [0.5, -0.5, 0.3]})
    # 0.1 * 4.3027 / sqrt(3) = 0.25
    assert '| full (`schedule="full"`) | 2.00 | 1.90 | 100% | 3 | 83.00 ± 0.95 | +2.00 [+1.75, +2.25] | 100% |' in text
    assert "| 1.00 | 1.04 | 100% | 3 | 82.90 ± 1.00 | +1.90 [+1.90, +1.90] | 95% |" in text
    assert "| qat | 1.00 | 1.00 | 0% | 3 | 81.00 ± 1.00 | - | - |" in text
    assert "| qat, twice the epochs | 2.00 | 2.00 | 0% | 3 | 81.00 ± 1.00 | +0.00 [+0.00, +0.00] | 0% |" in text
    assert "Full SAQ gains over plain QAT: +2.00 [+1.75, +2.25] points." in text
    assert "Cheapest with at least 90% of that mean gain: previous, with 1.00 times the passes of QAT." in text
    assert "</svg>" in (tmp_path / "page.svg").read_text()


def test_a_page_that_claims_nothing_where_there_is_nothing(tmp_path):
    text = write(tmp_path, {"full": [1.0, -1.0, 0.3], "previous": [-1.0, -1.1, -0.9]}, times=False)
    assert "an interval that contains zero or lies below it" in text
    assert "Cheapest" not in text
    assert "previous: -1.00 [-1.25, -0.75], an interval below zero." in text
    assert "| previous" in text and "| - | 100% |" in text  # no measured cost


def test_a_page_without_plain_training():
    with pytest.raises(ValueError, match="found 1 results, of .'full'.; expected some of qat"):
        table_rows([record("full", 0, 0.5)], None)

"""The page on further ways, from records by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.ways.page import write_page
from benchmarks.ways.rows import mean_minus, table_of, verdict

SEEDS = range(3)
PLAIN, SPREAD = (80.0, 81.0, 82.0), (-0.1, 0.0, 0.1)
"""Plain QAT of three seeds, and what differs between seeds in a gain: 0.1 * 4.3027 / sqrt(3) = 0.25."""


def record(task, way, seed, test, passes=1.0, seconds=2.0, steps=100):
    arguments = {"kind": "run", "task": task, "way": way, "seed": seed, "lr": 0.004, "rho": 0.2}
    arguments |= {"own": {"decay": 0.9}, "epochs": 30}
    outcome = {"test": test / 100, "passes": passes, "steps": steps, "cpu_seconds": seconds}
    return {"name": f"{task}-{way}/seed{seed}", "arguments": arguments, "outcome": outcome, "versions": {"torch": "1"}}


def records(gains):
    """Of both tasks; `gains` has way -> its mean gain over QAT on each."""
    found = []
    for i, task in enumerate(("vit", "cnn")):
        for seed in SEEDS:
            found.append(record(task, "qat", seed, PLAIN[seed]))
            found += [
                record(task, way, seed, PLAIN[seed] + of[i] + SPREAD[seed], passes=2.0, seconds=3.0)
                for way, of in gains.items()
            ]
    return found


def test_a_way_is_kept_if_it_wins_once_and_loses_nowhere():
    gains = {"full": (2.0, 1.0), "full + average": (2.5, 1.0), "full + clean scales": (2.5, 0.5)}
    gains |= {"full + radius per layer": (2.05, 1.05), "full + loss budget": (1.0, 3.0)}
    found = records(gains)
    for r in found:  # what is the same in both cancels; these differ from full by numbers that vary with the seed
        if "+" in r["arguments"]["way"]:
            r["outcome"]["test"] += SPREAD[r["arguments"]["seed"]] / 100
    table = table_of(found)
    verdicts = {way: verdict(table, way) for way in gains}
    assert verdicts == {
        "full": "for comparison",
        "full + average": "keep",
        "full + clean scales": "drop",
        "full + radius per layer": "drop",
        "full + loss budget": "drop",
    }


def test_a_way_must_not_fall_behind_what_has_its_price():
    gains = {"qat, echoed batches": (0.0, 0.0), "echo 2": (2.0, 2.0), "momentum (MSAM)": (1.0, 1.0)}
    assert verdict(table_of(records(gains)), "momentum (MSAM)") == "drop"
    assert verdict(table_of(records({**gains, "echo 2": (0.5, 1.0)})), "momentum (MSAM)") == "keep"


def test_a_way_must_beat_its_control():
    gains = {"full": (1.0, 1.0), "full + clean scales": (2.0, 2.0), "full, choices of clean scales": (2.0, 2.0)}
    found = records(gains)
    assert verdict(table_of(found), "full + clean scales") == "fails its control"
    for r in found:
        if "choices" in r["arguments"]["way"]:
            r["outcome"]["test"] -= (0.5 + SPREAD[r["arguments"]["seed"]]) / 100
    assert verdict(table_of(found), "full + clean scales") == "keep"


def test_nothing_is_decided_before_all_tasks_have_runs():
    found = [r for r in records({"full": (1, 1), "full + average": (3, 3)}) if r["arguments"]["task"] == "vit"]
    part = [r for r in records({"full": (1, 1)}) if r["arguments"]["task"] == "cnn"]
    table = table_of([*found, *part])
    assert verdict(table, "full + average") is None and mean_minus(table, "full + average", "full") is None
    with pytest.raises(ValueError, match="cnn: found runs of .'full'.; expected some of qat"):
        table_of([r for r in part if r["arguments"]["way"] == "full"])


def test_the_page_by_hand(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(records({"full": (2.0, 1.0), "full + average": (3.0, 0.5)})))
    write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| full | 2.00 | 1.50 | 3 | 83.00 ± 1.10 | +2.00 [+1.75, +2.25] | 100% |" in text
    assert "| full + average | 2.00 | 1.50 | 3 | 84.00 ± 1.10 | +3.00 [+2.75, +3.25] | 150% |" in text
    assert "| qat | 1.00 | 1.00 | 3 | 81.00 ± 1.00 | - | - |" in text
    assert "| full + average | 2.00 | 1.50 | +1.75 [+1.50, +2.00] | 117% | full | +0.25 [+0.25, +0.25] |" in text
    assert "dropped; minus full +1.00 [+1.00, +1.00] (vit), -0.50 [-0.50, -0.50] (cnn)." in text
    assert "| full + average | 0.004, 0.2, decay 0.9 | 0.004, 0.2, decay 0.9 |" in text

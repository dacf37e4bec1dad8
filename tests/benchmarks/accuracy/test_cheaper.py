"""The search for cheaper ways: what is tried where, and the table of docs/cheaper.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.accuracy.cheaper import page, search
from benchmarks.accuracy.cheaper.ways import MOBILENET, RATES, SEEDS, TASKS, VIT, WAYS
from benchmarks.accuracy.methods import QAT, SAQ
from benchmarks.shared.runs import Runs, records_in

STORED = Path(__file__).parents[3] / "benchmarks" / "results" / "accuracy"
GOOD, BAD = "last eighth of the layers", "head"


def record(task: str, way: str, seed: int, validation: float) -> dict:
    arguments = search.arguments_of(task, way, seed)
    return {
        "name": search.name_of(arguments),
        "arguments": arguments,
        "outcome": {"validation": validation},
        "versions": {"python": "3", "commit": "abc"},
    }


@pytest.fixture
def stored(tmp_path):
    """Trials on the first task in which case 3 gains four points, `GOOD` three, `BAD` one, and all others two."""
    runs = Runs(tmp_path, "command", {})
    gains = {QAT: 0.0, SAQ: 0.04, GOOD: 0.03, BAD: 0.01}
    for way in WAYS:
        for seed in SEEDS:
            runs.store(record(MOBILENET, way, seed, 0.6 + gains.get(way, 0.02) + 0.001 * (seed - SEEDS[0])))
    return runs


def test_every_way_costs_at_most_a_pass_and_an_eighth_but_the_one_that_is_compared_with():
    assert WAYS[SAQ].passes == 2
    matched = "an eighth of the batch, radius matched"
    assert WAYS[matched].passes == pytest.approx(1.125 + 1 / 64)
    assert all(way.passes <= 1.125 for name, way in WAYS.items() if name not in (SAQ, matched))


@pytest.mark.parametrize("task", TASKS)
def test_rates_and_seeds_against_the_runs_that_are_reported(task):
    """The rates are those that QAT and case 3 chose; no seed that chooses is one of theirs."""
    for method, rate in zip((QAT, SAQ), RATES[task], strict=True):
        names = f"{task}-w{search.BITS}-{method.replace(' ', '-')}-seed*.json"
        runs = [record["arguments"] for record in records_in(STORED, names)]
        assert runs and {run["lr"] for run in runs} == {rate}
        assert not {run["seed"] for run in runs} & set(SEEDS)


def test_a_way_that_keeps_less_than_a_half_is_not_tried_again(stored):
    assert search.worth_trying(stored, MOBILENET) == list(WAYS)
    assert set(WAYS) - set(search.worth_trying(stored, VIT)) == {BAD}


def test_what_to_try_next_needs_all_trials(stored):
    (stored.directory / f"{search.name_of(search.arguments_of(MOBILENET, GOOD, SEEDS[1]))}.json").unlink()
    with pytest.raises(ValueError, match=rf"no trial of '{GOOD}' with seeds \[{SEEDS[1]}\].*Run --tasks {MOBILENET}"):
        search.worth_trying(stored, VIT)


def test_no_share_is_kept_of_no_gain():
    assert search.kept({QAT: 0.6, SAQ: 0.6, GOOD: 0.7}) == {}


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match=r"--tasks \['digits'\]: unknown; expected some of"):
        search.SearchArguments(tasks=["digits"])


def test_the_page_ranks_by_the_mean_over_both_tasks(stored):
    for way, validation in ((QAT, 0.80), (SAQ, 0.82), (GOOD, 0.81), ("every 8th step", 0.84)):
        for seed in SEEDS:
            stored.store(record(VIT, way, seed, validation))
    records = [json.loads(path.read_text()) for path in sorted(stored.directory.glob("*.json"))]
    assert page.ranking(page.trials_of(records)) == [
        ("every 8th step", pytest.approx(3.0)),  # 2 and 4 points
        (GOOD, pytest.approx(2.0)),  # 3 and 1
    ]
    text = page.page(records)
    assert f"| {GOOD} | 1.12 | 0.3 | 63.00, 63.10 (63.05) | +3.00 | 75% |" in text
    assert f"| {GOOD} | 1.12 | 0.1 | 81.00, 81.00 (81.00) | +1.00 | 50% |" in text
    assert "less than 50% of the gain was kept" in text and BAD in text.split("Not tried")[1]

"""Accuracy of schedules: a whole tiny run, and going on after an interruption."""

from __future__ import annotations

import json

import pytest
from transformers import HfArgumentParser

from benchmarks.schedules import sweep as script
from benchmarks.shared.runs import Runs


@pytest.fixture
def arguments(tmp_path):
    return [
        *("--methods", "previous", script.LONGER, "--seeds", "0", "1", "--trial_seeds", "100"),
        *("--learning_rates", "0.004", "--radii", "0.1", "0.2", "--images", "20", "--pool", "30"),
        *("--validation_images", "1700", "--float_epochs", "1", "--epochs", "1"),
        *("--results", str(tmp_path / "results"), "--document", str(tmp_path / "docs" / "page.md")),
        *("--step_cost", str(tmp_path / "none.json")),
    ]


def stored(tmp_path):
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}


def test_a_run_and_what_a_restart_skips(arguments, tmp_path, monkeypatch):
    script.main(arguments)
    records = stored(tmp_path)
    methods = ("qat", script.LONGER, "full", "previous")
    runs = {f"{script.file_name(method)}-seed{seed}" for method in methods for seed in (0, 1)}
    trials = {"trial-qat-lr0.004-seed100", "trial-full-lr0.004-rho0.1-seed100", "trial-full-lr0.004-rho0.2-seed100"}
    best = records["full-seed0"]["arguments"]["rho"]
    trials |= {f"trial-previous-lr0.004-rho{round(f * best, 6):g}-seed100" for f in (0.125, 0.25, 0.5, 1.0)}
    assert set(records) == runs | trials
    outcome = {name: records[f"{script.file_name(name)}-seed0"]["outcome"] for name in methods}
    assert {o["float_model"] for o in outcome.values()} == {outcome["qat"]["float_model"]}
    assert outcome["qat"]["float_model"] != records["qat-seed1"]["outcome"]["float_model"]
    assert outcome[script.LONGER]["steps"] == 2 * outcome["qat"]["steps"] == 2
    assert [outcome[m]["perturbed_share"] for m in methods] == [0, 0, 1, 1]
    assert all("test" not in records[name]["outcome"] for name in trials)
    shown = (tmp_path / "docs" / "page.md").read_text()
    plot = (tmp_path / "docs" / "page.svg").read_text()
    assert "| previous" in shown and "page.svg" in shown and "</svg>" in plot

    # A restart trains nothing anew; after one result is lost, it trains that one, and gets the same again.
    trained = []
    original = script.train
    monkeypatch.setattr(script, "train", lambda *a, **k: trained.append(a) or original(*a, **k))
    script.main(arguments)
    assert not trained
    assert (tmp_path / "docs" / "page.md").read_text() == shown
    assert (tmp_path / "docs" / "page.svg").read_text() == plot
    (tmp_path / "results" / "full-seed1.json").unlink()
    script.main(arguments)
    assert len(trained) == 2  # and its float model
    again, before = stored(tmp_path)["full-seed1"]["outcome"], records["full-seed1"]["outcome"]
    assert {**again, "cpu_seconds": 0} == {**before, "cpu_seconds": 0}


def test_radius_and_learning_rates_are_chosen_on_validation(arguments, tmp_path, monkeypatch):
    """The best radius at QAT's learning rate, then the best learning rate at that radius; the smaller of equals."""
    scores = {("qat", 0.1, None): 0.5, ("qat", 0.2, None): 0.5, ("qat", 0.4, None): 0.4}
    scores |= {("full", 0.1, 1.0): 0.5, ("full", 0.1, 2.0): 0.6, ("full", 0.2, 2.0): 0.61, ("full", 0.4, 2.0): 0.6}
    scores |= {("previous", 0.2, 0.25): 0.3, ("previous", 0.2, 0.5): 0.7, ("previous", 0.2, 1.0): 0.7}
    scores |= {("previous", 0.2, 2.0): 0.6}
    asked = []

    def run(a):
        key = (a["method"], a["lr"], a["rho"])
        asked.append(key)
        return {"validation": scores[key]}

    work = script.Work.__new__(script.Work)
    (args,) = HfArgumentParser(script.ScheduleArguments).parse_args_into_dataclasses(
        [*arguments, "--learning_rates", "0.4", "0.1", "0.2", "--radii", "2", "1"]
    )
    work.args, work.run = args, run
    runs = Runs(tmp_path / "results", "python some.py")
    assert script.chosen(args, runs, work) == (0.1, 0.2, {"full": 2.0, "previous": 0.5})
    assert len(asked) == len(set(asked)) == 11


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "fast"], r"--methods \['fast'\]: unknown"),
        (["--trial_seeds", "1"], r"--trial_seeds \[1\]: expected none of the seeds \[0, 1\]"),
        (["--images", "31"], "--images 31: expected 1 to 30"),
        (["--validation_images", "1767"], "expected two positive numbers whose sum leaves some"),
    ],
)
def test_mistakes(arguments, extra, message):
    with pytest.raises(ValueError, match=message):
        script.main([*arguments, *extra])

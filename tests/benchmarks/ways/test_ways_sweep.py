"""Further ways to train: a whole tiny run, what a restart skips, and how settings are chosen."""

from __future__ import annotations

import json

import pytest
from transformers import HfArgumentParser

from benchmarks.shared.runs import Runs
from benchmarks.ways import sweep as script
from benchmarks.ways.bundles import bundled_records


@pytest.fixture
def arguments(tmp_path):
    return [
        *("--ways", "full + average", "--tasks", "cnn", "--seeds", "0", "1", "--trial_seeds", "100"),
        *("--learning_rates", "0.004", "--plain_learning_rates", "0.004", "--pool", "130"),
        *("--validation_images", "1600", "--float_epochs", "1", "--epochs", "1"),
        *("--results", str(tmp_path / "results"), "--document", str(tmp_path / "docs" / "page.md")),
    ]


def test_a_run_and_what_a_restart_skips(arguments, tmp_path, monkeypatch):
    script.main(arguments)
    files = sorted((tmp_path / "results").iterdir())
    assert [path.name for path in files] == ["cnn-full-with-average.json", "cnn-full.json", "cnn-qat.json"]
    records = {record["name"]: record for record in bundled_records(tmp_path / "results")}
    assert len(records) == (3 + 3 + 1) + 3 * 2  # settings and one rate; reported runs
    of_full, of_qat = records["cnn-full/seed0"], records["cnn-qat/seed0"]
    assert records["cnn-full-with-average/seed0"]["arguments"]["rho"] == of_full["arguments"]["rho"] > 0
    assert of_full["outcome"]["float_model"] == of_qat["outcome"]["float_model"]
    assert of_full["outcome"]["passes"] == 2 and of_qat["outcome"]["passes"] == 1
    assert all(("test" in r["outcome"]) == (r["arguments"]["kind"] == "run") for r in records.values())
    shown = (tmp_path / "docs" / "page.md").read_text()
    assert "| full + average | 2.00 |" in shown and "6 reported runs and 7 trials" in shown

    # A restart trains nothing anew; after one result is lost, it trains that one, and gets the same again.
    trained = []
    original = script.Work.run
    monkeypatch.setattr(script.Work, "run", lambda *a: trained.append(a) or original(*a))
    script.main(arguments)
    assert not trained and (tmp_path / "docs" / "page.md").read_text() == shown
    lost = [r for r in json.loads(files[1].read_text()) if r["name"] != "cnn-full/seed1"]
    files[1].write_text(json.dumps(lost))
    script.main(arguments)
    assert len(trained) == 1
    again = {r["name"]: r for r in bundled_records(tmp_path / "results")}["cnn-full/seed1"]["outcome"]
    assert {**again, "cpu_seconds": 0} == {**records["cnn-full/seed1"]["outcome"], "cpu_seconds": 0}


def test_controls_and_additions_to_plain_training_take_choices_of_others(arguments, tmp_path):
    """The noisy `eps` is along the gradient by 1 / sqrt(1 + noise^2) of its length."""
    args = parsed(arguments, "--ways", "balanced + noise", "qat + freezing", "--plain_learning_rates", "0.002", "0.01")

    def run(a):
        return {"validation": a["lr"] + a["own"].get("noise", 0.0)}

    runs = script.BundledRuns(tmp_path / "results", "python some.py")
    choices = script.chosen(args, runs, "cnn", run)
    noisy, control = choices["balanced + noise"], choices["balanced, shorter"]
    assert noisy.own == {"noise": 2} and control.lr == noisy.lr and control.own == {}
    assert control.rho == pytest.approx(noisy.rho / 5**0.5, abs=1e-6)
    tried = {r["arguments"]["lr"] for r in bundled_records(tmp_path / "results") if "freezing" in r["name"]}
    assert choices["qat"].lr == 0.01 and tried == {0.005, 0.01}


def parsed(arguments, *more):
    (args,) = HfArgumentParser(script.WayArguments).parse_args_into_dataclasses([*arguments, *more])
    return args


def test_settings_are_chosen_on_validation(arguments, tmp_path):
    """The best rate at the first setting, then the best setting at that rate; the first of equals."""
    args = parsed(arguments, "--learning_rates", "0.4", "0.1", "0.2", "--plain_learning_rates", "0.3", "0.1", "0.2")
    radius = script.TASKS["cnn"].radius
    scores = {("qat", 0.1, 0.0, None): 0.5, ("qat", 0.2, 0.0, None): 0.6, ("qat", 0.3, 0.0, None): 0.6}
    scores |= {("full", lr, radius, None): s for lr, s in ((0.1, 0.5), (0.2, 0.7), (0.4, 0.6))}
    scores |= {("full", 0.2, f * radius, None): s for f, s in ((0.5, 0.7), (2, 0.8))}
    scores |= {("full + average", lr, 2 * radius, 0.95): s for lr, s in ((0.1, 0.5), (0.2, 0.4), (0.4, 0.3))}
    scores |= {("full + average", 0.1, 2 * radius, d): s for d, s in ((0.9, 0.4), (0.98, 0.9))}
    asked = []

    def run(a):
        key = (a["way"], a["lr"], a["rho"], a["own"].get("decay"))
        asked.append(key)
        return {"validation": scores[key]}

    runs = script.BundledRuns(tmp_path / "results", "python some.py")
    choices = script.chosen(args, runs, "cnn", run)
    assert choices == {
        "qat": (0.2, 0.0, {}),
        "full": (0.2, 2 * radius, {}),
        "full + average": (0.1, 2 * radius, {"decay": 0.98}),
    }
    assert len(asked) == len(set(asked)) == 3 + 5 + 5


def test_every_way_has_the_same_number_of_trials(arguments):
    defaults = script.WayArguments()
    for way in script.WAYS.values():
        if way.choice_of is not None:
            continue
        rates = defaults.learning_rates if way.settings else defaults.plain_learning_rates
        assert len(rates) + max(len(way.settings) - 1, 0) == 4


def test_a_way_brings_along_what_it_builds_on():
    order = list(script.WAYS)
    assert script.needed(["echo 2 + average"]) == ["qat", "qat, echoed batches", "echo 2", "echo 2 + average"]
    for name, way in script.WAYS.items():
        assert order.index(way.builds_on) <= order.index(name)
        for other in (way.radius_of, way.choice_of):
            assert other is None or order.index(other) < order.index(name)


def test_runs_in_bundles_keep_their_arguments(tmp_path):
    runs = script.BundledRuns(tmp_path, "python some.py")
    assert isinstance(runs, Runs)
    runs.once("a/1", {"x": 1}, lambda: {"y": 2})
    runs.once("a/2", {"x": 2}, lambda: {"y": 3})
    assert [r["outcome"]["y"] for r in bundled_records(tmp_path)] == [2, 3]
    with pytest.raises(ValueError, match=r"a/1.json: this run is stored with other arguments, .'x': .1, 3.."):
        runs.once("a/1", {"x": 3}, lambda: {"y": 2})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ways", "fast"], r"--ways \['fast'\]: unknown"),
        (["--tasks", "moon"], r"--tasks \['moon'\]: unknown"),
        (["--trial_seeds", "1"], r"--trial_seeds \[1\]: expected none of the seeds \[0, 1\]"),
    ],
)
def test_mistakes(arguments, extra, message):
    with pytest.raises(ValueError, match=message):
        script.main([*arguments, *extra])

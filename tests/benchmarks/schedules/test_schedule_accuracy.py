"""Accuracy against cost of schedules: a whole tiny run, going on after an interruption, and the page."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import HfArgumentParser

from benchmarks.schedules import sweep as script
from benchmarks.schedules.page import preset_methods, relative_cost, table_rows, write_page
from benchmarks.shared import digits_training
from benchmarks.shared.images import draw
from benchmarks.shared.paired import half_width
from benchmarks.shared.runs import Runs
from benchmarks.shared.schedule_variants import VARIANTS, saq_config
from hf_saq import SAQConfig


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
    (args,) = HfArgumentParser(script.AccuracyArguments).parse_args_into_dataclasses(
        [*arguments, "--learning_rates", "0.4", "0.1", "0.2", "--radii", "2", "1"]
    )
    work.args, work.run = args, run
    runs = Runs(tmp_path / "results", "python some.py")
    assert script.chosen(args, runs, work) == (0.1, 0.2, {"full": 2.0, "previous": 0.5})
    assert len(asked) == len(set(asked)) == 11


def test_images_are_of_one_use_only():
    pool, validation, test = digits_training.load_split(450, 350)
    seen = [tuple(image.flatten().tolist()) for part in (pool, validation, test) for image in part.pixels]
    assert len(seen) == 1797
    assert not set(seen[:450]) & set(seen[450:]) and not set(seen[450:800]) & set(seen[800:])
    drawn = [draw(pool, 300, seed) for seed in (0, 1)]
    assert all(len(d) == 300 for d in drawn) and not torch.equal(drawn[0].labels, drawn[1].labels)
    assert {tuple(image.flatten().tolist()) for image in drawn[0].pixels} <= set(seen[:450])


def test_rho_zero_is_plain_training():
    """The step of every schedule, with a radius that moves nothing, ends at the parameters of plain QAT."""
    pool, _, _ = digits_training.load_split(60, 1700)
    state = digits_training.tiny_vit(3).state_dict()

    def trained(saq):
        model = digits_training.quantized(state, pool)
        found = digits_training.train(model, pool, 3, 4e-3, 1, saq)
        return model.state_dict(), found

    plain, found = trained(SAQConfig(**VARIANTS["qat"]))
    assert found["steps"] == 6 and found["perturbed_share"] == 0
    assert any(not torch.equal(plain[name], value) for name, value in state.items() if name in plain)
    for method in ("full", "start 0.5", "previous"):
        other, found = trained(saq_config(0.0, VARIANTS[method]))
        assert all(torch.equal(plain[name], value) for name, value in other.items()), method


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


# The page ------------------------------------------------------------------------------------------------------------

TIMES = {"full": 1.9, "previous": 1.04, "trigger": 1.45, "interval 5": 1.2}


def test_costs_that_follow_from_others():
    times = {way: {"ratio": ratio} for way, ratio in TIMES.items()}
    assert relative_cost("full", {}, times, 1.0) == 1.9
    assert relative_cost("start 0.5", {"start": 0.5}, times, 0.5) == pytest.approx(1.45)
    assert relative_cost("trigger", {"trigger": True}, times, 0.2) == pytest.approx(1 + 0.2 * 0.9)
    assert relative_cost("qat", {"case": None}, None, 0.0) == 1.0
    assert relative_cost("full", {}, None, 1.0) is None and relative_cost("look 5", {}, times, 0.2) is None


def test_the_interval_is_students():
    """Differences 0, 1, 2: standard deviation 1, t(0.975, 2) = 4.3027."""
    assert half_width([0.0, 1.0, 2.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(half_width([1.0]))


def test_presets_are_among_what_is_compared():
    assert preset_methods()["full"] == "full"
    assert set(preset_methods()) == {"full", "balanced", "free"}


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

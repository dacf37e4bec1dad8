"""The sweep over tasks, bits and methods: a whole tiny run, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.accuracy import page, study
from benchmarks.accuracy import sweep as script
from benchmarks.accuracy.methods import METHODS, QAT, SAQ, Method
from benchmarks.accuracy.tasks import TASKS
from benchmarks.shared.runs import fingerprint_of
from benchmarks.shared.schedule_variants import saq_config
from hf_saq.sharpness.schedules import PRESETS, PerturbationSchedule


def stored(tmp_path):
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}


def test_a_sweep_and_what_a_restart_skips(tiny, tmp_path, monkeypatch):
    tiny += ["--methods", QAT, SAQ, "qat, twice the steps", "balanced", "case 3, distilled"]
    script.main(tiny)
    records = stored(tmp_path)
    names = {f"digits-w2-{m.replace(', ', '-').replace(' ', '-')}" for m in tiny[tiny.index("--methods") + 1 :]}
    trials = {"digits-w2-qat-trial-lr0.004-seed100"}
    trials |= {f"digits-w2-case-3-trial-lr0.004-rho{rho}-seed100" for rho in ("0.1", "0.3")}
    assert set(records) == {f"{name}-seed{seed}" for name in names for seed in (0, 1)} | trials
    outcomes = {m: records[f"digits-w2-{m}-seed0"]["outcome"] for m in ("qat", "case-3", "qat-twice-the-steps")}
    assert len({o["float_model"] for o in outcomes.values()}) == 1
    assert [o["steps"] for o in outcomes.values()] == [3, 3, 6]
    assert [o["perturbed_share"] for o in outcomes.values()] == [0, 1, 0]
    radii = {records[f"digits-w2-{m}-seed1"]["arguments"]["saq"]["rho"] for m in ("case-3", "balanced")}
    assert len(radii) == 1 and radii <= {0.1, 0.3}
    assert all("test" not in records[name]["outcome"] for name in trials)
    assert all(0 <= records[name]["outcome"]["test"] <= 1 for name in set(records) - trials)

    trained = []
    original = study.train_one
    monkeypatch.setattr(study, "train_one", lambda *a: trained.append(a) or original(*a))
    script.main(tiny)
    assert not trained
    (tmp_path / "results" / "digits-w2-case-3-seed1.json").unlink()
    script.main(tiny)
    assert len(trained) == 1
    again, before = stored(tmp_path)["digits-w2-case-3-seed1"]["outcome"], records["digits-w2-case-3-seed1"]["outcome"]
    assert {**again, "cpu_seconds": 0} == {**before, "cpu_seconds": 0}

    # Other numbers of images are other runs, with the settings chosen for the task's own.
    script.main([*tiny, "--images_per_class", "2", "4", "--methods", QAT, SAQ])
    found = stored(tmp_path)
    assert {f"digits-w2-n{n}-{m}-seed{s}" for n in (2, 4) for m in ("qat", "case-3") for s in (0, 1)} == set(
        found
    ) - set(records)
    assert (
        found["digits-w2-n4-case-3-seed0"]["arguments"]["saq"] == records["digits-w2-case-3-seed0"]["arguments"]["saq"]
    )
    assert found["digits-w2-n4-case-3-seed0"]["outcome"]["training_images"] == 40

    document = tmp_path / "docs" / "page.md"
    page.write_page(tmp_path / "results", document)
    text = document.read_text()
    assert "| digits, tiny ViT, W2A2 | 20 |" in text and "</svg>" in (document.parent / "page_images.svg").read_text()


def test_a_radius_that_is_known_is_taken_without_trials(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "known", Method({"interval": 2}, radii={"digits": 0.77}))
    monkeypatch.setitem(METHODS, "known elsewhere", Method({"interval": 2}, radii={"flowers": 0.77}))
    script.main([*tiny, "--methods", SAQ, "known", "known elsewhere"])
    records = stored(tmp_path)
    rho = {
        method: {r["arguments"]["saq"]["rho"] for r in records.values() if r["arguments"]["method"] == method}
        for method in ("known", "known elsewhere")
    }
    assert rho["known"] == {0.77}
    assert rho["known elsewhere"] < {0.1, 0.3}  # one of those that case 3 tried
    assert not any("known" in name and "trial" in name for name in records)


def test_hopeless_values_are_not_tried(tiny, tmp_path, monkeypatch):
    """Far below the best so far: the next larger radius is left out."""
    task = dataclasses.replace(TASKS["digits"], radii=(0.1, 0.2, 0.3, 0.4))
    monkeypatch.setitem(TASKS, "digits", task)
    scores = {None: 0.5, 0.1: 0.6, 0.2: 0.56, 0.3: 0.5}
    monkeypatch.setattr(
        study,
        "train_one",
        lambda a, paths: {"test": 0.5} if a["kind"] == "run" else {"validation": scores[(a["saq"] or {}).get("rho")]},
    )
    script.main([*tiny, "--methods", QAT, SAQ])
    records = stored(tmp_path).values()
    tried = {
        r["arguments"]["saq"]["rho"] for r in records if r["arguments"]["kind"] == "trial" and r["arguments"]["saq"]
    }
    assert tried == {0.1, 0.2, 0.3}


def test_the_best_radius_on_validation_is_taken(tiny, tmp_path, monkeypatch):
    """The smaller of equals; each case has its own, and `balanced` that of case 3."""
    scores = {(QAT, None): 0.5, (SAQ, 0.1): 0.6, (SAQ, 0.3): 0.6, ("case 2", 0.1): 0.2, ("case 2", 0.3): 0.4}

    def train_one(arguments, paths):
        rho = arguments["saq"]["rho"] if arguments["saq"] else None
        if arguments["kind"] == "run":
            return {"test": 0.5}
        return {"validation": scores[arguments["method"], rho]}

    monkeypatch.setattr(study, "train_one", train_one)
    script.main([*tiny, "--methods", QAT, SAQ, "case 2", "balanced"])
    chosen = {r["arguments"]["method"]: r["arguments"]["saq"] for n, r in stored(tmp_path).items() if "trial" not in n}
    assert chosen[QAT] is None and chosen[SAQ] == {"rho": 0.1} and chosen["case 2"] == {"rho": 0.3, "case": 2}
    balanced = chosen["balanced"]
    assert balanced.pop("rho") == 0.1  # the other fields say the preset in the words of the runs that are stored
    assert saq_config(0.1, balanced).perturbation_schedule() == PerturbationSchedule(**PRESETS["balanced"])


def test_every_method_chooses_for_itself(tiny, tmp_path, monkeypatch):
    """Each runs with what its own trials found, as many for each; the page shows what was measured."""
    task = dataclasses.replace(
        TASKS["digits"],
        learning_rates=(2e-3, 4e-3),
        radii=(0.1, 0.3),
        adaptive_radii=(1, 3),
        plain_learning_rates=(1e-3, 2e-3, 4e-3),
    )
    monkeypatch.setitem(TASKS, "digits", task)
    best = {QAT: (2e-3, None), SAQ: (4e-3, 0.3), "qat, twice the steps": (1e-3, None), "balanced": (2e-3, 0.1)}

    def train_one(arguments, paths):
        lr, rho = best[arguments["method"]]
        good = (arguments["lr"] == lr) + ((arguments["saq"] or {}).get("rho") == rho)
        passes = 2.0 if arguments["method"] == SAQ else 1.1 if arguments["method"] == "balanced" else 1.0
        told = {"passes": passes, "cpu_seconds": 7.0 * passes, "float_model": f"{arguments['seed']}"}
        return {**told, "validation": good / 2, "test": 0.5, "float_test": 0.6, "training_images": 30}

    monkeypatch.setattr(study, "train_one", train_one)
    script.main([*tiny, "--methods", *best])
    for name, (lr, rho) in best.items():
        of_method = [r["arguments"] for r in stored(tmp_path).values() if r["arguments"]["method"] == name]
        assert sum(a["kind"] == "trial" for a in of_method) == 3, name
        used = [(a["lr"], (a["saq"] or {}).get("rho")) for a in of_method if a["kind"] == "run"]
        assert used == [(lr, rho)] * 2, name
    page.write_page(tmp_path / "results", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| method | passes | time | learning rate | radius |" in text
    assert "| qat, twice the steps | 2.00 | 1.00 | 0.001 | - | 2 |" in text
    assert "| balanced | 1.10 | 1.10 | 0.002 | 0.1 | 2 |" in text
    assert "a learning rate and a radius of its own, the best of 3 trials each; cases 1 and 2 and the last" in text
    assert "| digits | 2 | qat, twice the steps | 0.001 | - | " in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "sam"], r"--methods \['sam'\]: unknown; expected some of \['qat'"),
        (["--tasks", "imagenet"], r"--tasks \['imagenet'\]: unknown"),
        (["--seeds", "100"], r"--seeds \[100\]: expected none of \[100\]"),
        (["--processes", "0"], "--processes 0: expected at least one"),
        (["--bits", "7"], r"--bits \[7\]: none of the tasks"),
    ],
)
def test_mistakes(tiny, extra, message):
    with pytest.raises(ValueError, match=message):
        script.main([*tiny, *extra])


def test_tasks_without_their_data_are_skipped(tiny, tmp_path, capsys):
    tiny[tiny.index("digits")] = "flowers"
    script.main([*tiny, "--bits", "3", "--flowers", str(tmp_path / "nowhere"), "--mobilenet", str(tmp_path)])
    assert f"flowers: skipped, {tmp_path / 'nowhere'} is not there; name another place with --flowers." in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "results").exists()


def test_a_sweep_does_not_mix_float_models(tiny, tmp_path, monkeypatch):
    """A run that was stored elsewhere keeps others of its seed from starting here; other seeds may."""
    monkeypatch.setitem(TASKS, "digits", dataclasses.replace(TASKS["digits"], float_per_seed=False))
    # Train nothing: what is asked for here is which runs are made.
    state = {"weight": torch.arange(3.0)}
    outcome = {"validation": 0.5, "test": 0.5, "float_test": 0.6, "float_model": fingerprint_of(state)}
    monkeypatch.setattr(script, "ensure_float_model", lambda *a: None)
    monkeypatch.setattr(study, "float_state", lambda *a: state)
    monkeypatch.setattr(study, "train_one", lambda *a: dict(outcome))
    script.main([*tiny, "--methods", QAT])
    path = tmp_path / "results" / "digits-w2-qat-seed1.json"
    moved = json.loads(path.read_text())
    moved["outcome"]["float_model"] = "another"
    path.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=r"digits-w2-qat-seed1: .* float model another, found .* other than \[0, 1\]"):
        script.main([*tiny, "--methods", QAT, SAQ])
    with pytest.raises(ValueError, match="digits-w2-qat-seed1: this run is stored"):
        script.main([*tiny, "--methods", SAQ])  # other methods alone are compared with it as well
    script.main([*tiny, "--methods", QAT])  # nothing to train, nothing to mix
    script.main([*tiny, "--methods", QAT, SAQ, "--seeds", "2"])
    assert "digits-w2-case-3-seed2" in stored(tmp_path) and "digits-w2-case-3-seed1" not in stored(tmp_path)

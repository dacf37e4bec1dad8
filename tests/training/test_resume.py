"""Resuming is exact: train(2n) equals train(n), save, resume in a fresh process's objects, train(n)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from matrices import matrix
from processes import SUPPORT, run_python
from resume_runs import MODELS, MOMENTS, STEPS, make_trainer
from torch import nn
from transformers import TrainerCallback

from hf_saq import SAQConfig, SAQQuantizationConfig, SharpnessAwareMinimizer, quantize
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep
from hf_saq.training.checkpoints import last_complete_checkpoint, what_is_missing
from hf_saq.training.schedule_state import load_schedule, save_schedule


def state_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal_states(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def interrupted(family, output_dir, step, **how):
    """Train to `step`, then resume in a new trainer with a fresh float model."""
    first = make_trainer(family, output_dir, **how)
    first.add_callback(StopAt(step))
    first.train()
    second = make_trainer(family, output_dir, **how)
    second.train(resume_from_checkpoint=True)
    return second


@matrix(2, family=MODELS.keys(), sync=["local", "global"])
def test_resume_is_exact(family, sync, tmp_path):
    how = {"saq_config": SAQConfig(rho=0.1, sync=sync, interval=2 if sync == "global" else 1)}
    whole = make_trainer(family, tmp_path / "whole", **how)
    whole.train()
    resumed = interrupted(family, tmp_path / "parts", 4, **how)
    assert resumed.state.global_step == STEPS
    assert_equal_states(state_of(resumed), state_of(whole))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]


SCHEDULES = {
    "stale": ("vit", dict(reuse="stale", interval=3)),
    "previous": ("swin", dict(reuse="previous")),
    "previous, batch norms": ("resnet", dict(reuse="previous")),
    "echo": ("vit", dict(reuse="echo", interval=5)),
    "look": ("vit", dict(reuse="look", interval=3, sync="global")),
    "trigger": ("resnet", dict(trigger=True)),
    "last layers": ("vit", dict(ascent_depth=0.5)),
}
"""Interrupted after step 4, when each of them but the last needs what earlier steps left."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_under_a_schedule_is_exact(name, tmp_path):
    family, knobs = SCHEDULES[name]
    whole = make_trainer(family, tmp_path / "whole", saq_config=SAQConfig(rho=0.1, **(knobs or {"schedule": "full"})))
    whole.train()
    resumed = interrupted(
        family, tmp_path / "parts", 4, saq_config=SAQConfig(rho=0.1, **(knobs or {"schedule": "full"}))
    )
    assert resumed.state.global_step == STEPS
    assert_equal_states(state_of(resumed), state_of(whole))
    tensors, values = whole.scheduled_step.state()
    assert_equal_states(resumed.scheduled_step.state()[0], tensors)
    assert resumed.scheduled_step.state()[1] == values
    if whole.scheduled_step.schedule.has_state:
        assert tensors or values.get("mean") is not None  # there was something to remember


@pytest.mark.parametrize("reuse", ["stale", "previous", "echo"])
def test_tied_weights_with_case_1_are_saved_and_resumed_exactly(reuse, tmp_path):
    """Case 1 adds one and the same tensor behind both quantizers of a weight that two layers have."""
    knobs = dict(reuse=reuse) if reuse == "previous" else dict(reuse=reuse, interval=4)
    config = SAQQuantizationConfig(weight_bits=3, activation_bits=None, first_last_bits=None)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(4)]

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        net[2].weight = net[0].weight
        return quantize(net, config)

    def train(net, step, numbers):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def backward(batch, reduce=True):
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            loss.backward()
            return loss

        for k in numbers:
            step.micro_batch(0, [data[k]], backward, k, len(data))
            optimizer.step()
            optimizer.zero_grad()

    def step_of(net):
        return ScheduledStep(SharpnessAwareMinimizer(net, rho=0.3, case=1), PerturbationSchedule(**knobs))

    whole = build()
    train(whole, step_of(whole), range(4))
    first, resumed = build(), build()
    step = step_of(first)
    train(first, step, range(2))
    tensors, _ = step.state()
    tied = [tensor for name, tensor in tensors.items() if name.endswith(("0.weight_quantizer", "2.weight_quantizer"))]
    assert len(tied) == 2 and tied[0] is tied[1]
    save_schedule(step, tmp_path, process=0, processes=1)
    resumed.load_state_dict(first.state_dict())
    again = step_of(resumed)
    load_schedule(again, tmp_path, process=0, processes=1)
    assert_equal_states(again.state()[0], tensors)
    train(resumed, again, range(2, 4))
    assert_equal_states(resumed.state_dict(), whole.state_dict())


def test_the_state_of_a_schedule_must_be_there_and_fit(tmp_path):
    how = dict(saq_config=SAQConfig(rho=0.1, reuse="previous"), max_steps=2)
    trainer = make_trainer("vit", tmp_path, **how)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    file = checkpoint / "perturbation_state_0.safetensors"
    with pytest.raises(ValueError, match="was written with processes 1, but this run has 2"):
        load_schedule(trainer.scheduled_step, checkpoint, process=0, processes=2)
    other = make_trainer("vit", tmp_path, saq_config=SAQConfig(rho=0.1, reuse="look", interval=2))
    with pytest.raises(ValueError, match="was written with schedule \"reuse='previous'\", but this run has"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a stored perturbation is for this tensor, but ResNet.* has no quantizer"):
        fresh = make_trainer("resnet", tmp_path, **how)
        load_schedule(fresh.scheduled_step, checkpoint, process=0, processes=1)
    file.write_bytes(file.read_bytes()[:-10])
    assert "perturbation_state_0.safetensors cannot be read" in what_is_missing(checkpoint)
    file.unlink()
    with pytest.raises(ValueError, match="perturbation_state_0.safetensors is missing: a run with reuse='previous'"):
        make_trainer("vit", tmp_path, **how).train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="was trained with reuse='previous', but this run goes on with reuse=None"):
        make_trainer("vit", tmp_path, max_steps=2).train(resume_from_checkpoint=True)  # nothing is asked


OTHER_SETTINGS = {
    "radius": (dict(rho=0.3), "rho=0.1", "rho=0.3"),
    "case": (dict(case=1), "case=3", "case=1"),
    "plain": (dict(case=None), "case=3", "case=None"),
    "adaptive": (dict(adaptive=True), "adaptive=False", "adaptive=True"),
    "kinds": (dict(perturb=["weight"]), "perturb=['bias', 'norm', 'weight']", "perturb=['weight']"),
    "processes": (dict(sync="global"), "sync='local'", "sync='global'"),
    "knobs": (
        dict(schedule=None, interval=2, ascent_fraction=0.5, start=0.5),
        "interval=1, start=0.0, ascent_fraction=1.0",
        "interval=2, start=0.5, ascent_fraction=0.5",
    ),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_run_that_goes_on_with_other_settings_says_so(name, tmp_path):
    """The radius was changed between the two runs without a word."""
    changes, before, now = OTHER_SETTINGS[name]
    given = dict(rho=0.1, schedule="full")
    make_trainer("vit", tmp_path, saq_config=SAQConfig(**given), max_steps=2).train()
    trainer = make_trainer("vit", tmp_path, saq_config=SAQConfig(**{**given, **changes}), max_steps=3)
    with pytest.warns(UserWarning) as told:
        trainer.train(resume_from_checkpoint=True)
    (text,) = [str(warning.message) for warning in told]
    assert f"checkpoint-2 was trained with {before}, but this run goes on with {now}. " in text


def test_settings_that_come_to_the_same_are_not_told(tmp_path):
    """Warnings are errors here. Fields without effect, and what a preset or a default stands for, may be written
    otherwise; older checkpoints do not say how they were trained."""
    make_trainer("vit", tmp_path, saq_config=SAQConfig(schedule="full"), max_steps=2).train()
    radius = make_trainer("vit", tmp_path, saq_config=SAQConfig(schedule="full")).minimizer.rho
    same = SAQConfig(rho=radius, interval=1, eta=0.5, look_alpha=0.1, perturb=["bias", "norm", "weight"])
    make_trainer("vit", tmp_path, saq_config=same, max_steps=4).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "perturbation_settings.json").unlink()
    make_trainer("vit", tmp_path, saq_config=SAQConfig(rho=0.3)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_the_best_model_is_loaded_exactly(family, tmp_path):
    """ViT and Swin have other names on disk than in memory; a raw load would leave the last weights in place."""
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer = make_trainer(
        family,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst loss: an early checkpoint, not the last state
    )
    trainer.add_callback(Keep())
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert_equal_states(state_of(trainer), kept[best])
    if best != STEPS:
        assert any(not torch.equal(kept[STEPS][n], v) for n, v in kept[best].items())


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    run_python(SUPPORT / "resume_runs.py", directory)
    return directory


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    trainer = make_trainer("vit", tmp_path_factory.mktemp("whole"))
    trainer.train()
    return state_of(trainer)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_from_the_last_complete_checkpoint(moment, killed, uninterrupted, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(killed / moment, directory)
    expected = "checkpoint-4" if moment == "between_saves" else "checkpoint-2"
    assert Path(last_complete_checkpoint(directory)).name == expected
    trainer = make_trainer("vit", directory)
    trainer.train(resume_from_checkpoint=True)
    assert_equal_states(state_of(trainer), uninterrupted)
    assert Path(last_complete_checkpoint(directory)).name == f"checkpoint-{STEPS}"


def test_saving_a_step_again_first_takes_the_old_state_away(tmp_path, monkeypatch):
    trainer = make_trainer("vit", tmp_path, max_steps=2)
    trainer.train()
    assert what_is_missing(tmp_path / "checkpoint-2") is None
    again = make_trainer("vit", tmp_path, max_steps=2)
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert "trainer_state.json" in what_is_missing(tmp_path / "checkpoint-2")


def test_clear_errors(tmp_path):
    trainer = make_trainer("vit", tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="it is not a directory"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        make_trainer("vit", tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    weights.unlink()
    assert what_is_missing(checkpoint) == "it holds no weights"

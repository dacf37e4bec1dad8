"""A schedule of one's own is one class and one line in the registry: configuration, Trainer and resuming know it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import make_trainer

from hf_saq import SAQConfig
from hf_saq.sharpness import Displacement
from hf_saq.sharpness.schedules import SCHEDULES, Outcome, StepRule


class Descent(StepRule):
    """Displaces each pass against the gradient of the step before: a schedule that nobody would want."""

    def forget(self):
        self.eps = Displacement()

    @classmethod
    def check(cls, knobs):
        if knobs.interval > 1:
            raise ValueError(f"reuse='descent' with interval={knobs.interval}; leave interval out.")

    def micro_batch(self, micro):
        with self.minimizer.displaced(self.eps), self.minimizer.recorded():
            outcome = Outcome(micro.backward(micro.batch))
        if micro.is_last:
            self.eps = self.minimizer.climb()
            for eps in [*self.eps.outputs.values(), *self.eps.in_place.values()]:
                eps.neg_()
        return outcome

    def state(self):
        return self.eps.named(self.minimizer.model), {}

    def load_state(self, tensors, values):
        self.eps = Displacement.from_named(tensors, self.minimizer.model)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "descent", Descent)


def parameters(trainer) -> dict[str, nn.Parameter]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_it_is_known_where_the_others_are(registered, tmp_path):
    schedule = SAQConfig(reuse="descent").perturbation_schedule()
    assert schedule.cost == 1.0 and schedule.has_state and schedule.action(3, 10) == "reuse"
    with pytest.raises(ValueError, match="SAQConfig.reuse='descent' with interval=2; leave interval out"):
        SAQConfig(reuse="descent", interval=2)
    how = dict(dtype=torch.float32, max_steps=4)
    whole = make_trainer("vit", 3, 1, "local", tmp_path / "whole", knobs=dict(reuse="descent"), **how)
    whole.train()
    saving = dict(save_strategy="steps", save_steps=2)
    make_trainer("vit", 3, 1, "local", tmp_path / "half", knobs=dict(reuse="descent"), **how, **saving).train()
    resumed = make_trainer("vit", 3, 1, "local", tmp_path / "half", knobs=dict(reuse="descent"), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    previous = make_trainer("vit", 3, 1, "local", tmp_path / "previous", knobs=dict(reuse="previous"), **how)
    previous.train()
    for name, p in parameters(whole).items():
        assert torch.equal(p, parameters(resumed)[name]), name
    assert any(not torch.equal(p, parameters(previous)[name]) for name, p in parameters(whole).items())


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"SAQConfig.reuse='descent'; expected one of \[None, 'stale', 'previous'"):
        SAQConfig(reuse="descent")

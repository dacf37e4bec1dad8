"""Layers that are replaced between the steps of a schedule that remembers, and what is stored of it then."""

from __future__ import annotations

import copy

import pytest
import torch
from minimizer_nets import batch, linear_net, loss_of, quantized
from torch import nn

from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

KNOBS = [dict(reuse="previous"), dict(reuse="stale", interval=3), dict(reuse="echo", interval=3)]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_what_a_replaced_head_was_moved_by_is_not_stored(knobs):
    """A checkpoint is written after the head was replaced: it has no place for what moved the old one. The run
    that resumes from it goes on as this one does."""
    net = copy.deepcopy(quantized(linear_net)).train()
    step = ScheduledStep(SharpnessAwareMinimizer(net, rho=0.4), PerturbationSchedule(**knobs))
    first, then = batch(net), batch(net, seed=1)

    def run(one: ScheduledStep, data: tuple, number: int) -> dict[str, torch.Tensor]:
        def backward(data, reduce=True):  # noqa: ARG001
            loss = loss_of(one.minimizer.model, data)
            loss.backward()
            return loss.detach()

        one.minimizer.model.zero_grad()
        one.micro_batch(0, [data], backward, number, 6)
        return {name: p.grad for name, p in one.minimizer.model.named_parameters() if p.grad is not None}

    run(step, first, 0)
    number = next(k for k in reversed(range(len(net))) if hasattr(net[k], "weight_quantizer"))
    whole = set(step.state()[0])
    net[number] = nn.Linear(net[number].in_features, net[number].out_features)
    tensors, values = step.state()
    assert not [name for name in tensors if name.removeprefix("eps.").startswith(f"{number}.")]
    assert {name for name in whole if not name.removeprefix("eps.").startswith(f"{number}.")} == set(tensors)
    resumed = ScheduledStep(SharpnessAwareMinimizer(copy.deepcopy(net), rho=0.4), PerturbationSchedule(**knobs))
    resumed.load_state(tensors, values)
    expected = run(step, then, 1)
    for name, gradient in run(resumed, then, 1).items():
        assert torch.equal(gradient, expected[name]), name

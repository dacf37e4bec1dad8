"""Layers that are replaced or frozen between the steps of a schedule that remembers, and what is stored of it then."""

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


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_what_was_frozen_since_is_not_moved(knobs):
    """A user freezes the head and a norm half-way: biases and norms were still moved by the `eps` of before. The rest
    of it is added as it was."""
    net = quantized(linear_net)
    step = ScheduledStep(SharpnessAwareMinimizer(net, rho=0.4), PerturbationSchedule(**knobs))
    met: list[dict[str, torch.Tensor]] = []

    def backward(data, reduce=True):  # noqa: ARG001
        found = {name: p.detach().clone() for name, p in net.named_parameters()}
        weights = {f"{k}.weight": net[k].quantized_weight().detach().clone() for k in (0, 3, 5)}
        met.append(found | weights)
        loss = loss_of(net, data)
        loss.backward()
        return loss.detach()

    step.micro_batch(0, [batch(net)], backward, 0, 6)
    eps = step.rule.eps
    frozen = {f"{part}.{name}" for part in (1, 5) for name, _ in net[part].named_parameters(recurse=False)}
    assert frozen == {"1.weight", "1.bias", "5.weight", "5.bias"}
    parameters = dict(net.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)
    step.micro_batch(0, [batch(net, seed=1)], backward, 1, 6)
    for k in (0, 3):
        w_q = net[k].weight_quantizer.fake_quantize(net[k].weight)
        assert torch.equal(met[-1][f"{k}.weight"], w_q + eps.outputs[net[k].weight_quantizer])
        assert torch.equal(met[-1][f"{k}.bias"], net[k].bias + eps.in_place[net[k].bias])
    assert torch.equal(met[-1]["5.weight"], net[5].weight_quantizer.fake_quantize(net[5].weight))
    for name in frozen - {"5.weight"}:
        assert torch.equal(met[-1][name], parameters[name]), name


def test_a_component_is_not_added_to_what_was_frozen_since():
    """An optimizer steps wherever there is a gradient: zeros of `zero_grad(set_to_none=False)`, with a component."""
    net = quantized(linear_net)
    step = ScheduledStep(SharpnessAwareMinimizer(net, rho=0.4), PerturbationSchedule(reuse="look", interval=3))

    def backward(data, reduce=True):  # noqa: ARG001
        loss = loss_of(net, data)
        loss.backward()
        return loss.detach()

    step.micro_batch(0, [batch(net)], backward, 0, 6)
    net.zero_grad(set_to_none=False)
    net[5].requires_grad_(False)
    step.micro_batch(0, [batch(net, seed=1)], backward, 1, 6)
    assert not net[5].weight.grad.any() and not net[5].bias.grad.any()
    assert net[3].bias.grad.any()

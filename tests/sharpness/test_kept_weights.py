"""The second pass uses the quantized weights of the first: nothing but time changes, and only where nothing moved."""

from __future__ import annotations

import copy

import pytest
import torch
from minimizer_nets import batch, conv_net, linear_net, loss_of, quantized, two_passes
from torch import nn

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.quantizers import LSQQuantizer, affine, affine_fake_quantize
from hf_saq.sharpness.kept_weights import KeptWeights
from hf_saq.sharpness.perturbed_tensors import quantized_weights
from hf_saq.sharpness.schedules.schedule import PerturbationSchedule
from hf_saq.sharpness.schedules.step import ScheduledStep


@pytest.fixture
def weights_quantized(monkeypatch):
    """Shapes of the parameters that were quantized, in order."""
    found = []
    original = affine.quantize_forward

    def spied(x, *args):
        if isinstance(x, nn.Parameter):
            found.append(tuple(x.shape))
        return original(x, *args)

    monkeypatch.setattr(affine, "quantize_forward", spied)
    return found


def trained(net, schedule: PerturbationSchedule, sync: str = "local", micro_batches: int = 2, **scope) -> nn.Module:
    minimizer = SharpnessAwareMinimizer(net, rho=0.3, sync=sync, **scope)
    step = ScheduledStep(minimizer, schedule)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def backward(data, reduce=True):
        loss = loss_of(net, data)
        loss.backward()
        return loss.detach()

    for number in range(4):
        batches = [batch(net, seed=10 * number + k) for k in range(micro_batches)]
        for k in range(micro_batches):
            step.micro_batch(k, batches, backward, number, 4)
        optimizer.step()
        optimizer.zero_grad()
    minimizer.detach()
    return net


@pytest.mark.parametrize("build", [linear_net, conv_net])
@pytest.mark.parametrize("sync", ["local", "global"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize(
    "schedule",
    [
        PerturbationSchedule(),
        PerturbationSchedule(ascent_fraction=0.5),
        PerturbationSchedule(interval=2, reuse="stale"),
        PerturbationSchedule(interval=2, reuse="look"),
        PerturbationSchedule(reuse="previous"),
    ],
    ids=["full", "half", "stale", "look", "previous"],
)
def test_training_is_the_same_bit_for_bit(build, sync, adaptive, schedule, monkeypatch):
    ours = trained(quantized(build), schedule, sync, adaptive=adaptive)
    monkeypatch.setattr(LSQQuantizer, "output_can_be_given", False)
    plain = trained(quantized(build), schedule, sync, adaptive=adaptive)
    start = quantized(build)
    for (name, p), q, s in zip(ours.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q), name
        if name != "3.bias" or build is linear_net:  # in front of a batch norm
            assert not torch.equal(p, s), name  # it did train


def test_weights_are_quantized_once_in_a_step(weights_quantized):
    net = quantized(linear_net)
    weights_quantized.clear()
    two_passes(net, SharpnessAwareMinimizer(net, rho=0.1), batch(net))
    assert weights_quantized == [(16, 12), (16, 16), (4, 16)]


def test_a_plain_first_pass_counts_as_well(weights_quantized):
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    weights_quantized.clear()
    loss_of(net, batch(net)).backward()
    with minimizer.perturbed():
        loss_of(net, batch(net)).backward()
    assert len(weights_quantized) == 3


def test_the_second_forward_of_a_block_computes_its_own(weights_quantized):
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    data = batch(net)
    with minimizer.ascent():
        loss_of(net, data).backward()
    weights_quantized.clear()
    with minimizer.perturbed():
        first = net(data[0])
        assert not weights_quantized
        second = net(data[0])
        assert len(weights_quantized) == 3
    assert torch.equal(first, second)
    assert not torch.equal(first, net(data[0]))


@pytest.mark.parametrize("moved", ["weight", "scale", "sign"])
def test_what_was_written_to_is_quantized_anew(moved, weights_quantized):
    """Weights or step sizes that change between the passes: the second sees `Q` of the new ones."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    data = batch(net)
    with minimizer.ascent():
        loss_of(net, data).backward()
    layer = net[3]
    with torch.no_grad():
        if moved == "weight":
            layer.weight.mul_(-1)
        elif moved == "scale":
            layer.weight_quantizer.scale.mul_(2)
        else:
            layer.weight_quantizer.take_state(signed=False)
    minimizer.armed = False
    expected = layer.weight_quantizer(layer.weight)  # before `perturbed`: nothing is added
    weights_quantized.clear()
    seen = []
    layer.weight_quantizer.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    with minimizer.perturbed() as eps:
        loss_of(net, data).backward()
    assert weights_quantized == [(16, 16)]
    assert torch.equal(seen[0], expected + eps.outputs[layer.weight_quantizer])


def test_a_perturbed_scale_is_no_kept_weight(weights_quantized):
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1, perturb=("weight", "scale"))
    weights_quantized.clear()
    two_passes(net, minimizer, batch(net))
    assert len(weights_quantized) == 6


@pytest.mark.parametrize("case", [1, 2])
def test_other_cases_quantize_twice(case, weights_quantized):
    net = quantized(linear_net)
    weights_quantized.clear()
    two_passes(net, SharpnessAwareMinimizer(net, rho=0.1, case=case), batch(net))
    assert len(weights_quantized) == 6


def test_quantizers_that_transform_weights_are_left_alone():
    net = linear_net()
    quantize(net, SAQQuantizationConfig(weight_bits=3, activation_bits=3, first_last_bits=None, quantizer="liq"))
    calibrate(net, [batch(net)[0]])
    kept = KeptWeights()
    for entry in quantized_weights(net):
        w_q = entry.quantizer(entry.weight)
        kept.keep(entry, entry.weight, w_q)
        assert kept.give({entry.quantizer: torch.zeros_like(w_q)}) == set()


def test_only_what_the_quantizer_read_itself_is_kept():
    """A weight that somebody passes in for the parameter (`functional_call`), or in another type (FSDP)."""
    (entry,) = quantized_weights(quantized(lambda: nn.Sequential(nn.Linear(12, 4))))
    w_q = entry.quantizer(entry.weight)
    eps = {entry.quantizer: torch.ones_like(w_q)}
    kept = KeptWeights()
    kept.keep(entry, entry.weight.detach().clone(), w_q)
    assert kept.give(eps) == set()
    kept.keep(entry, entry.weight, w_q.bfloat16())
    assert kept.give(eps) == set()
    kept.keep(entry, entry.weight, w_q)
    kept.clear()
    assert kept.give(eps) == set()
    kept.keep(entry, entry.weight, w_q)
    assert kept.give({}) == set()  # nothing is added to it
    kept.keep(entry, entry.weight, w_q)
    assert kept.give(eps) == {entry.quantizer}
    other = torch.randn_like(entry.weight)
    assert torch.equal(entry.quantizer(other), copy.deepcopy(entry.quantizer)(other))  # not what was read: computed
    assert torch.equal(entry.quantizer(entry.weight), w_q + 1)
    assert torch.equal(entry.quantizer(entry.weight), w_q)  # given once


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    """A layer that the second pass does not reach, and an exception in it."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    data = batch(net)
    with minimizer.ascent():
        loss_of(net, data).backward()
    expected = net(data[0])
    try:
        with minimizer.perturbed():
            net[0](data[0]).sum().backward()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(entry.quantizer.given_output is None for entry in quantized_weights(net))
    assert torch.equal(net(data[0]), expected)


@pytest.mark.parametrize("offset", [None, torch.tensor([0.1])], ids=["linear", "affine"])
def test_gradients_are_those_of_the_quantizer(offset):
    """Whatever is returned, gradients belong to `Q(x)`."""
    torch.manual_seed(0)
    x, grad, given = torch.randn(3, 40, 5, dtype=torch.float64)
    results = []
    for y in (None, given):
        leaves = [t.clone().requires_grad_() for t in (x, torch.tensor([0.3], dtype=torch.float64))]
        leaves += [] if offset is None else [offset.double().requires_grad_()]
        out = affine_fake_quantize(*leaves[:2], None if offset is None else leaves[2], -4, 3, 0.5, given=y)
        assert y is None or torch.equal(out, y)
        results.append(torch.autograd.grad(out, leaves, grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0


def test_a_number_may_be_given():
    x = torch.tensor(0.7, requires_grad=True)
    out = affine_fake_quantize(x, torch.tensor([0.5]), None, -4, 3, given=torch.tensor(9.0))
    assert out.shape == () and out.item() == 9

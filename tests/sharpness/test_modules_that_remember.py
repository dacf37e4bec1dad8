"""Modules that remember, such as a queue of features or a centre: a step does so once, as plain training does."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from minimizer_nets import batch, linear_net, loss_of, quantized, two_passes
from torch import Tensor, nn

from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

RHO = 0.4


class Remembers(nn.Module):
    """Subtracts a centre that follows its inputs, compares with the features of earlier batches, counts its calls."""

    writes_data = False

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("positions", torch.arange(3).expand(2, 3), persistent=False)  # nobody can write there
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("queue", torch.zeros(0, features))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("latest", None, persistent=False)
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.centre.clone(), self.queue.clone(), self.latest is None))
        centre, near = self.centre.clone(), (x @ self.queue.T).logsumexp(dim=1, keepdim=True).clamp(min=-1)
        if self.training:
            written = self.centre.data if self.writes_data else self.centre
            written.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))  # in place
            self.queue = torch.cat([self.queue, x.detach()])[-16:]  # another tensor in its place
            self.latest = x.detach().mean()
            self.calls += 1
        return x - centre + 0.1 * near


quantized_once = cache(quantized)


def net_that_remembers(place: int = 6) -> nn.Sequential:
    layers = list(copy.deepcopy(quantized_once(linear_net)))
    return nn.Sequential(*layers[:place], Remembers(4 if place == 6 else 16), *layers[place:]).train()


def memory(net: nn.Module) -> Remembers:
    return next(m for m in net if isinstance(m, Remembers))


def remembered(net: nn.Module) -> list[Tensor]:
    return [memory(net).centre, memory(net).queue, memory(net).calls, memory(net).latest]


def assert_remembers(net: nn.Module, other: nn.Module) -> None:
    assert memory(net).calls > 0
    for found, expected in zip(remembered(net), remembered(other), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", [1, 2, 3])
@pytest.mark.parametrize("writes_data", [False, True])
def test_a_step_in_two_passes_remembers_the_first_alone(case, writes_data):
    """The second pass finds what the first one found: not its own images in the queue. Codebooks that follow their
    inputs are often written through `.data`, which shows in no version."""
    net = net_that_remembers()
    memory(net).writes_data = writes_data
    plain = copy.deepcopy(net)
    minimizer = SharpnessAwareMinimizer(net, rho=RHO, case=case)
    for seed in range(3):  # the weights stay, so both nets see the same
        loss_of(plain, batch(net, seed=seed)).backward()
        two_passes(net, minimizer, batch(net, seed=seed))
        (centre, queue, is_first), (again, queue_again, is_first_again) = memory(net).seen[-2:]
        assert torch.equal(centre, again) and torch.equal(queue, queue_again) and is_first == is_first_again
    assert_remembers(net, plain)


def test_without_a_radius_the_second_gradient_is_the_first():
    """Closed form: two passes at one point that see the same have one gradient."""
    net = net_that_remembers()
    plain = copy.deepcopy(net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.0)
    for seed in range(3):
        plain.zero_grad()
        net.zero_grad()
        loss_of(plain, batch(net, seed=seed)).backward()
        two_passes(net, minimizer, batch(net, seed=seed))
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


KNOBS = [
    dict(),
    dict(ascent_fraction=0.5),
    dict(ascent_depth=0.3),
    dict(trigger=True),
    dict(match_radius=True, ascent_fraction=0.5),
]


@pytest.mark.parametrize("sync", ["local", "global"])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_schedule_remembers_what_plain_training_does(knobs, sync):
    """Two micro-batches a step; with a radius of zero the whole training is plain training."""
    net = net_that_remembers(place=3)
    plain = copy.deepcopy(net)
    step = ScheduledStep(SharpnessAwareMinimizer(net, rho=0.0, sync=sync), PerturbationSchedule(**knobs))

    def backward(data, reduce=True):  # noqa: ARG001
        loss = loss_of(net, data) / 2
        loss.backward()
        return loss.detach()

    for number in range(3):
        batches = [batch(net, seed=2 * number + k) for k in range(2)]
        net.zero_grad()
        plain.zero_grad()
        for k, data in enumerate(batches):
            step.micro_batch(k, batches, backward, number, 3)
            (loss_of(plain, data) / 2).backward()
        assert_remembers(net, plain)
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_pass_that_fails_leaves_what_the_first_one_remembered():
    net = net_that_remembers()
    plain = copy.deepcopy(net)
    minimizer, data = SharpnessAwareMinimizer(net, rho=RHO), batch(net)
    loss_of(plain, data).backward()
    with minimizer.ascent():
        loss_of(net, data).backward()
    with pytest.raises(KeyError), minimizer.perturbed():
        net(data[0])
        raise KeyError
    assert_remembers(net, plain)


class MomentumEncoder(nn.Module):
    """Compares features with those of a frozen encoder that follows the trained one in every forward (MoCo, BYOL)."""

    def __init__(self):
        super().__init__()
        self.online = quantized(linear_net)
        self.slow = copy.deepcopy(self.online).requires_grad_(False)
        self.found: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.found.append(self.slow[0].weight.clone())
        with torch.no_grad():
            for p, q in zip(self.online.parameters(), self.slow.parameters(), strict=True):
                q.data = q.data * 0.9 + p.data * 0.1 + 0.01
            near = self.slow(x)
        return self.online(x) - near


def test_a_momentum_encoder_takes_one_step():
    """It took two, the second towards biases and norms that were perturbed."""
    net, data = MomentumEncoder().train(), batch(linear_net())
    plain, still = copy.deepcopy(net), copy.deepcopy(net)
    loss_of(plain, data).backward()
    two_passes(net, SharpnessAwareMinimizer(net, rho=RHO), data)
    assert torch.equal(*net.found)
    for p, q in zip(net.slow.parameters(), plain.slow.parameters(), strict=True):
        assert torch.equal(p, q)
    two_passes(still, SharpnessAwareMinimizer(still, rho=0.0), data)
    for p, q in zip(still.online.parameters(), plain.online.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class NormOfItsOwn(nn.Module):
    """Follows the mean of its inputs as a norm does, in a new tensor each time; `running_scale` comes with use."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.detach().mean(dim=0)
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            if self.running_scale is None:
                self.running_scale = mean.abs() + 1
        return x / (1 if self.running_scale is None else self.running_scale)


@pytest.mark.parametrize("knobs", [dict(), dict(ascent_fraction=0.5), dict(reuse="echo", interval=2)], ids=str)
def test_running_statistics_that_are_put_in_place_anew_follow_one_pass_of_a_step(knobs):
    layers = list(copy.deepcopy(quantized_once(linear_net)))
    net = nn.Sequential(*layers[:3], NormOfItsOwn(16), *layers[3:]).train()
    plain = copy.deepcopy(net)
    step = ScheduledStep(SharpnessAwareMinimizer(net, rho=0.0), PerturbationSchedule(**knobs))

    def backward(data, reduce=True):  # noqa: ARG001
        loss = loss_of(net, data)
        loss.backward()
        return loss.detach()

    steps = 2 if "reuse" in knobs else 3
    for number in range(steps):
        net.zero_grad()
        data = batch(net, seed=number)
        step.micro_batch(0, [data], backward, number, steps)
        if number == 0 or "reuse" not in knobs:  # later visits of a batch update nothing
            loss_of(plain, data).backward()
    for name in ("running_mean", "running_scale"):
        assert torch.equal(getattr(net[3], name), getattr(plain[3], name)), name

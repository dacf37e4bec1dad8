"""The ways to train whose steps are timed, against what their schedules say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.step_cost import ways
from benchmarks.step_cost.latent_sam import latent_sam_step
from benchmarks.step_cost.models import CLASSES, MODELS


def test_steps_in_a_period_are_those_of_the_schedule(small, monkeypatch):
    """Passes of two periods, by counting backwards: 1 + 1/k, 2, 1, and the trigger fires at every second step."""
    bench = ways.prepare({"model": "small", "batch_size": 2, "device": "cpu", "bits": 4, "processes": 1})
    passes = []
    original = ways.Bench.backward
    monkeypatch.setattr(ways.Bench, "backward", lambda *a, **k: passes.append(1) or original(*a, **k))
    expected = {"interval 2": 1.5, "interval 5": 1.2, "stale 5": 1.2, "look 5": 1.2, "trigger": 1.5}
    expected |= {"full": 2, "qat": 1, "previous": 1, ways.SAM: 2, "case 1": 2, "ascent 1/4": 2}
    for way, cost in expected.items():
        with ways.one_step_of(way, bench) as (step, period):
            passes.clear()
            for _ in range(2 * period):
                step()
            assert len(passes) == pytest.approx(2 * period * cost), way
    assert not any(m._forward_hooks for m in bench.model.modules())  # as if no minimizer had been there


@pytest.mark.parametrize(("way", "cost"), [("last eighth", 2), ("last quarter, every 2nd step", 1.5), ("previous", 1)])
def test_what_only_the_first_step_does_is_not_timed(small, monkeypatch, way, cost):
    """The trial that finds the last layers takes passes of its own; those of the periods after it are counted here."""
    bench = ways.prepare({"model": "small", "batch_size": 2, "device": "cpu", "bits": 4, "processes": 1})
    passes = []
    original = ways.Bench.backward
    monkeypatch.setattr(ways.Bench, "backward", lambda *a, **k: passes.append(1) or original(*a, **k))
    with ways.one_step_of(way, bench) as (step, period):
        for _ in range(ways.untimed_steps(way, period)):
            step()
        passes.clear()
        for _ in range(2 * period):
            step()
    assert len(passes) == 2 * period * cost


def test_latent_sam_is_sam():
    """On L = p^2 / 2 from p = 3: up by rho to 3.5, gradient there 3.5, down from 3 by 0.1 times that."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward() -> torch.Tensor:
        loss = model.weight.square().sum() / 2
        loss.backward()
        return loss

    loss = latent_sam_step(model, optimizer, 0.5, backward)
    assert loss.item() == 4.5
    torch.testing.assert_close(model.weight, torch.tensor([[3 - 0.1 * 3.5]]))
    assert model.weight.grad is None


def test_models_of_both_families_take_their_images():
    for name in ("vit-small-images", "resnet18-small-images"):
        kind = MODELS[name]
        images = torch.randn(1, 3, kind.image_size, kind.image_size)
        assert copy.deepcopy(kind.build()).eval()(images).shape == (1, CLASSES)

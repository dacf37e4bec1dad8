"""A step reads at most one number back from the device: each one makes the host wait for all that was started."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import quantized_model

from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

STEPS = 4


class CountReads(TorchDispatchMode):
    """Counts what reads a number out of a tensor: `.item()`, `float()`, `bool()`, comparisons in `if`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def reads_of_steps(knobs: dict | None, family: str) -> list[int]:
    """How often each of some optimizer steps reads, under a schedule, or in plain training."""
    model = quantized_model(family, torch.float32).train()
    step = None
    if knobs is not None:
        step = ScheduledStep(SharpnessAwareMinimizer(model, rho=0.1), PerturbationSchedule(**knobs))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0])

    def backward(batch, reduce=True):
        loss = model(pixel_values=batch["x"], labels=batch["y"]).loss
        loss.backward()
        return loss.detach()

    found = []
    for number in range(STEPS):
        batch = {"x": images, "y": labels}
        with CountReads() as reads:
            if step is None:
                backward(batch)
            else:
                step.micro_batch(0, [batch], backward, number, STEPS)
        found.append(reads.count)
        model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize(
    ("knobs", "allowed"),
    [
        (dict(start=1.0), [0, 0, 0, 0]),
        (dict(), [1, 1, 1, 1]),
        (dict(ascent_fraction=0.5), [1, 1, 1, 1]),
        (dict(interval=2), [1, 0, 1, 0]),
        (dict(reuse="stale", interval=2), [1, 0, 1, 0]),
        (dict(reuse="previous"), [1, 1, 1, 1]),
        (dict(reuse="look", interval=2), [1, 1, 1, 1]),
        (dict(trigger=True), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_reads_of_a_step(knobs, allowed, family):
    plain = reads_of_steps(None, family)
    found = reads_of_steps(knobs, family)
    passes = 2 if "start" not in knobs else 1
    # What the model itself reads in each of its passes is not ours.
    own = [total - passes * model for total, model in zip(found, plain, strict=True)]
    assert all(n <= most for n, most in zip(own, allowed, strict=True)), own
    if "start" not in knobs:
        assert sum(found) > 0  # reads are seen at all

"""The training loop that benchmarks share: learning rates and passes, as counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.shared.training_loop import adamw, fit
from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, quantize


def batches(*sizes):
    while True:
        for size in sizes:
            yield {"pixels": torch.ones(size, 4), "labels": torch.zeros(size, dtype=torch.long)}


def rates(total, warmup):
    """Learning rate of every step, by the update of a weight whose gradient never changes (SGD)."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []

    def loss_of(model, batch):
        seen.append(model.weight.item())
        return -model.weight.sum()

    fit(model, batches(2), total, optimizer, None, loss_of, warmup=warmup)
    seen.append(model.weight.item())
    return [after - before for before, after in zip(seen, seen[1:], strict=False)]


def test_learning_rates():
    """Up along a line, then down along a cosine: 1/3, 2/3, 1, ..., towards zero."""
    falling = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates(4, 0) == pytest.approx(falling, abs=1e-6)
    assert rates(6, 2) == pytest.approx([1 / 3, 2 / 3, *falling], abs=1e-6)


@pytest.mark.parametrize(
    ("saq", "passes"),
    [
        (None, 1.0),
        (SAQConfig(rho=0.1, schedule="full"), 2.0),
        (SAQConfig(rho=0.1, interval=2), 1.5),
        (SAQConfig(rho=0.1, ascent_fraction=0.25), 1 + (4 + 2) / (16 + 8)),
        (SAQConfig(rho=0.1, schedule="free"), 1.0),
    ],
    ids=["qat", "full", "interval 2", "a quarter", "free"],
)
def test_passes_are_counted_by_images(saq, passes):
    """On batches of 16 and 8 in turn; the parts of the fourth case are 4 and 2 images."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    quantize(model, SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    calibrate(model, [torch.randn(8, 4)])
    is_even = saq is not None and (saq.interval == 2 or saq.schedule == "free")  # steps that differ see batches alike
    sizes = (8, 8) if is_even else (16, 8)
    found = fit(model, batches(*sizes), 4, adamw(model, 1e-3), saq)
    assert found["passes"] == pytest.approx(passes) and found["steps"] == 4

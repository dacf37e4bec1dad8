"""A model small enough to time in a test."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks.step_cost.models import MODELS, StepModel


@pytest.fixture
def small(monkeypatch):
    """A model whose memory is its weights: 2 MiB of them."""

    def build() -> nn.Module:
        layers = [nn.Linear(256, 256) for _ in range(8)]
        return nn.Sequential(nn.Conv2d(3, 256, 8), nn.Flatten(), *layers, nn.Linear(256, 10))

    monkeypatch.setitem(MODELS, "small", StepModel(build, 8))

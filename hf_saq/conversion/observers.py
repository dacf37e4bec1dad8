"""Observers keep what calibration keeps of the inputs that quantizers see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..quantizers import Observer

SAMPLES_PER_BATCH = 2**17
"""Values kept of each activation tensor. Rare large values decide a clipping point: 131,072 draws see those that make
up a ten-thousandth of an activation, and are still small enough for any model."""


class ActivationObserver(Observer):
    """Keeps the smallest value and a random sample of all values of a quantizer's input."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ran = False
        self.minimum = float("inf")
        self.samples: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        self.ran = True
        flat = x.detach().reshape(-1)
        if flat.numel():
            smallest, largest = (bound.item() for bound in flat.aminmax())
            if not math.isfinite(smallest) or not math.isfinite(largest):
                raise ValueError(
                    f"{self.path}: calibration found infinite or NaN values, so there is no range to fit; check the "
                    "batches, and the weights of the layers before it."
                )
            self.minimum = min(self.minimum, smallest)
            if flat.numel() > SAMPLES_PER_BATCH:
                # At random: an even stride can fall into step with the layout and keep missing a channel or a place.
                # From a seed of its own, so that every process draws alike.
                draw = torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=self.generator)
                flat = flat[draw.to(flat.device)]
            self.samples.append(flat.float())


class PassThrough(Observer):
    """Lets the float weight through while activations are observed."""

    ran = False

    def update(self, x: Tensor) -> None:  # noqa: ARG002
        self.ran = True

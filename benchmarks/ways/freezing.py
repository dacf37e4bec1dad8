"""Freeze the codes of weights that oscillate: Nagel et al., arXiv:2203.11086, Algorithm 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hf_saq.sharpness import QuantizedWeight, quantized_weights

MOMENTUM = 0.05
"""Of the frequency of oscillations and of the average code: the paper's 0.01 is made for longer training."""

FIRST_THRESHOLD = 0.5
"""Frequency of an oscillation in every second step, which is the highest there is."""


class OscillationFreezing:
    """Freezes, after each optimizer step, weights whose codes went up and down more often than a threshold.

    A frozen weight stays at its average code, rounded, times the scale, which goes on learning. The threshold goes
    along a cosine from 0.5 to `threshold` at the end of training.

    Args:
        total: Optimizer steps of the training.
        threshold: Oscillations a step, at the end; infinity freezes nothing.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, total: int, threshold: float):
        self._weights = [_Weight(entry) for entry in quantized_weights(model)]
        self._total, self._threshold, self._steps = total, threshold, 0
        optimizer.register_step_post_hook(self._step)

    @torch.no_grad()
    def _step(self, *_: Any) -> None:
        self._steps += 1
        if math.isinf(self._threshold):
            return
        left = (1 + math.cos(math.pi * self._steps / self._total)) / 2
        threshold = self._threshold + (FIRST_THRESHOLD - self._threshold) * left
        for weight in self._weights:
            weight.step(threshold)

    @property
    def frozen_share(self) -> float:
        """Return the share of quantized weights that are frozen."""
        count = sum(w.is_frozen.numel() for w in self._weights)
        return sum(int(w.is_frozen.sum()) for w in self._weights) / count


class _Weight:
    """Follows the codes of one quantized weight."""

    def __init__(self, entry: QuantizedWeight):
        self.entry = entry
        self.codes = self._read()
        self.average = self.codes.clone()
        self.last_change = torch.zeros_like(self.codes)
        self.frequency = torch.zeros_like(self.codes)
        self.is_frozen = torch.zeros_like(self.codes, dtype=torch.bool)
        self.frozen_code = torch.zeros_like(self.codes)

    def _read(self) -> torch.Tensor:
        return self.entry.quantizer.quantize(self.entry.weight.detach()).float()

    def step(self, threshold: float) -> None:
        codes = torch.where(self.is_frozen, self.frozen_code, self._read())
        change = (codes - self.codes).sign()
        changed = change != 0
        oscillated = changed & (change == -self.last_change)
        self.frequency.lerp_(oscillated.float(), MOMENTUM)
        self.average.lerp_(codes, MOMENTUM)
        self.last_change = torch.where(changed, change, self.last_change)
        self.codes = codes
        new = (self.frequency > threshold) & ~self.is_frozen
        self.frozen_code = torch.where(new, self.average.round(), self.frozen_code)
        self.is_frozen |= new
        scale, offset = self.entry.quantizer.grid(self.entry.weight.detach())
        values = self.frozen_code * scale + offset
        self.entry.weight.copy_(torch.where(self.is_frozen, values, self.entry.weight))

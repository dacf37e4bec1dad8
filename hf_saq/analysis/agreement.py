"""Say how far two models agree: share of equal predictions, and signal to noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def agreement(logits: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Compute the share of equal predictions, the largest of dimension 1, over all batches."""
    same = [(a.argmax(1) == b.argmax(1)).double().flatten() for a, b in zip(logits, reference, strict=True)]
    return torch.cat(same).mean().item()


def signal_to_noise(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Compute `10 log10(|y|^2 / |y - y'|^2)` in decibels, `y` the reference, over all batches."""
    signal = sum(b.double().square().sum().item() for b in reference)
    noise = sum((a.double() - b.double()).square().sum().item() for a, b in zip(values, reference, strict=True))
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """Compute `10 log10(signal / noise)`; infinite without noise, minus infinity if there is nothing but noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf

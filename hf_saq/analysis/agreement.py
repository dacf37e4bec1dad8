"""Say how far two models agree: share of equal predictions, and signal to noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantizers import in_double

NO_PREDICTION = -1
"""What stands for the class of scores of which one is NaN: sorting would take them for some class."""


def predictions(logits: Tensor, axis: int = 1) -> Tensor:
    """Return the class with the largest score along `axis`; `NO_PREDICTION` where one of the scores is NaN."""
    return logits.argmax(axis).masked_fill(logits.isnan().any(axis), NO_PREDICTION)


def agreement(logits: Sequence[Tensor], reference: Sequence[Tensor], axes: Sequence[int] | None = None) -> float:
    """Compute the share of equal predictions over all batches; what has no prediction agrees with nothing.

    Args:
        axes: The dimension of the classes in each batch; 1 by default.

    Raises:
        ValueError: If there are no logits.
    """
    if not logits:
        raise ValueError(
            "the model has returned no logits; expected a `loss` that calls the model itself, not a part of it."
        )
    same = []
    for a, b, axis in zip(logits, reference, axes or [1] * len(logits), strict=True):
        class_a, class_b = predictions(a, axis), predictions(b, axis)
        same.append(in_double((class_a == class_b) & (class_a != NO_PREDICTION)).flatten())
    return torch.cat(same).mean().item()


def signal_to_noise(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Compute `10 log10(|y|^2 / |y - y'|^2)` in decibels, `y` the reference, over all batches."""
    signal = sum(in_double(b).square().sum().item() for b in reference)
    noise = sum((in_double(a) - in_double(b)).square().sum().item() for a, b in zip(values, reference, strict=True))
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """Compute `10 log10(signal / noise)`; NaN if one of them is NaN or both are infinite.

    Infinite without noise, minus infinity if there is nothing but noise.
    """
    if not noise:
        return math.inf if signal == signal else math.nan
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan

"""Grids with the smallest squared quantization error, by a search over clipping points."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import shared_dimensions

CANDIDATES = 100
RANGE_CANDIDATES = 50


def mse_scale(x: Tensor, scale_shape: tuple[int, ...], qmin: int, qmax: int, shift: float = 0.0) -> Tensor:
    """Minimise the mean of `(x - s * (clip(round(x/s - shift), qmin, qmax) + shift))^2`.

    Candidates are `s = max|x| * k/100 / (qmax + shift)`, `k = 1..100`.

    Args:
        x: Values to fit, at least one.
        scale_shape: `(1,)` or a shape that broadcasts against `x`, such as `(out, 1)`: one search per channel.
        shift: Offset of the grid in steps: 0 for a grid through zero, 1/2 for one that is symmetric without it.

    Returns:
        Step sizes of shape `scale_shape`; zero where all values of a channel are zero.
    """
    shared = shared_dimensions(x, scale_shape)
    largest = x.abs().amax(dim=shared, keepdim=True) if shared else x.abs()
    best = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest)
    for k in range(1, CANDIDATES + 1):
        candidate = (largest * (k / CANDIDATES) / (qmax + shift)).clamp_min(torch.finfo(x.dtype).tiny)
        codes = (x / candidate).sub_(shift).round_().clamp_(qmin, qmax)
        error = codes.add_(shift).mul_(candidate).sub_(x).square_()
        error = error.mean(dim=shared, keepdim=True) if shared else error
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
    return torch.where(largest > 0, scale, 0).reshape(scale_shape)


def mse_range(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The ends of `levels` evenly spaced values with the smallest mean squared error on `x`, found one end at a time.

    The upper end moves from the largest value towards the mean in 50 steps, then the lower end likewise, then the
    upper end once more: the two hardly depend on each other unless the distribution is skewed.

    Args:
        x: Values to fit, at least one, any shape.

    Returns:
        `(low, high)`, each `(1,)`; equal if all values are.
    """
    x = x.reshape(-1)
    mean = x.mean()
    to_low, to_high = x.min() - mean, x.max() - mean
    tiny = torch.finfo(x.dtype).tiny

    def error(low: float, high: float) -> float:
        start = mean + to_low * low
        step = ((to_high * high - to_low * low) / (levels - 1)).clamp_min(tiny)
        nearest = (x - start).div_(step).round_().clamp_(0, levels - 1).mul_(step).add_(start)
        return nearest.sub_(x).square_().mean().item()

    fractions = [k / RANGE_CANDIDATES for k in range(RANGE_CANDIDATES, 0, -1)]
    low = 1.0
    high = min(fractions, key=lambda f: error(low, f))
    low = min(fractions, key=lambda f: error(f, high))
    high = min(fractions, key=lambda f: error(low, f))
    return (mean + to_low * low).reshape(1), (mean + to_high * high).reshape(1)

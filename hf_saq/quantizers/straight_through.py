"""Round and clamp with gradients that pass as if nothing had been done."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FLOOR = 1e-7
"""A learned step size is used as `max(scale, SCALE_FLOOR)`: it never divides by zero and never turns negative.

About the smallest number that is not zero in float16, the type an activation may have."""


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004 (autograd's signature)
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class _FloorStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clamp_min(SCALE_FLOOR)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded (Bengio et al., arXiv:1308.3432)."""
    return _RoundStraightThrough.apply(x)


def positive(scale: Tensor) -> Tensor:
    """Compute `max(scale, SCALE_FLOOR)`. The gradient is that of `scale`, so a scale below the floor can come back."""
    return _FloorStraightThrough.apply(scale)

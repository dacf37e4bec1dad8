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
    return with_gradient_of(x, x.round()) if asks_for_operations() else _RoundStraightThrough.apply(x)


def positive(scale: Tensor) -> Tensor:
    """Compute `max(scale, SCALE_FLOOR)`. The gradient is that of `scale`, so a scale below the floor can come back."""
    if asks_for_operations():
        return with_gradient_of(scale, scale.clamp_min(SCALE_FLOOR))
    return _FloorStraightThrough.apply(scale)


def asks_for_operations() -> bool:
    """Whether `torch.jit.trace` or a transform of `torch.func` (grad, vmap, jvp) looks on.

    A trace cannot store a `torch.autograd.Function`, and transforms would need a rule of each; torch's own operations
    suit both.
    """
    if torch.compiler.is_compiling():  # has its own way with functions, and could not trace what follows
        return False
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def with_gradient_of(path: Tensor, value: Tensor) -> Tensor:
    """Return `value` to the bit, with the gradient that `path` has; `path` is finite wherever `value` is."""
    return value.detach() + (path - path.detach())

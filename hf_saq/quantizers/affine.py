"""Quantize onto an affine grid, with gradients for step size and offset: the function behind all quantizers."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import Grid, quantize_backward, quantize_forward
from .settings import Role
from .statistics import sum_to
from .straight_through import SCALE_FLOOR, asks_for_operations, with_gradient_of


class LSQFactor(NamedTuple):
    """Computes LSQ's factor `g = 1 / sqrt(N * qmax)` on the gradient of a step size (Section 2.2, arXiv:1902.08153).

    `N` counts the elements that share one step size (of one sample, for activations: the mean over the batch is
    already in the loss). The factor is computed in the backward pass only, because a forward that is traced with open
    sizes does not know `N` as a number.
    """

    role: Role

    def value(self, x: Tensor, scale: Tensor, grid: Grid) -> float:
        sizes = x.shape[1:] if self.role == "activation" else x.shape
        return 1 / math.sqrt(max(math.prod(sizes) / scale.numel(), 1) * grid.qmax)


class FakeQuantize(torch.autograd.Function):
    """Quantizes, and saves nothing but its inputs: `x` is alive anyway, a mask of its size would not be."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        grid: Grid,
        factor: float | LSQFactor,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.grid, ctx.factor = grid, factor
        step = scale.detach().clamp_min(SCALE_FLOOR)
        if not torch.compiler.is_compiling():
            # Refer to `x` weakly: what manages saved tensors (checkpointing, offloading) decides how long it lives.
            ctx.made_of = MadeOf(weakref.ref(x), step, None if offset is None else offset.detach(), grid)
        return quantize_forward(x, step, offset, grid)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, offset = ctx.saved_tensors
        _, of_scale, of_offset, *_ = ctx.needs_input_grad
        grad_x, of_steps = quantize_backward(grad, x, scale.clamp_min(SCALE_FLOOR), offset, ctx.grid, of_scale)
        factor = ctx.factor.value(x, scale, ctx.grid) if isinstance(ctx.factor, LSQFactor) else ctx.factor
        grad_scale = grad_offset = None
        if of_steps is not None:
            grad_scale = (of_steps * factor).to(scale.dtype)
        if of_offset:  # outside alone
            grad_offset = (sum_to(grad - grad_x, offset.shape) * factor).to(offset.dtype)
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, grad_offset, None, None


class MadeOf(NamedTuple):
    """Holds what the output of [`FakeQuantize`] was made of, so that it can be made again."""

    x: weakref.ref[Tensor]
    scale: Tensor
    offset: Tensor | None
    grid: Grid

    @torch.no_grad()
    def remake(self, x: Tensor) -> Tensor:
        """Make the output again, from an equal `x`."""
        return quantize_forward(x, self.scale, self.offset, self.grid)


def made_of(x_q: Tensor) -> MadeOf | None:
    """Tell what fake quantization made `x_q` of; `None` if something else made it, or if it needs no gradient."""
    return getattr(x_q.grad_fn, "made_of", None)


def affine_fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_scale: float | LSQFactor = 1.0,
    through_rounding: bool = True,
) -> Tensor:
    """Compute `x_q = s * clip(round(v), qmin, qmax) + o` with `v = (x - o)/s`, differentiable in `x`, `s` and `o`.

    With rounding passed straight through, and "inside" meaning `qmin <= v <= qmax`:

        d x_q / d x = 1 inside,              0 outside
        d x_q / d s = round(v) - v inside,   qmin or qmax outside
        d x_q / d o = 0 inside,              1 outside

    Args:
        x: Any shape.
        scale: Step size `s`, `(1,)` or broadcastable against `x`; used as `max(s, SCALE_FLOOR)`.
        offset: Grid value of code 0, the shape of `scale`; `None` for a grid through zero.
        grad_scale: Factor on the gradients of `scale` and `offset`: a number, or how LSQ finds it.
        through_rounding: Whether the rounding error counts in `d x_q / d s`; if not it is 0 inside, as in PACT.

    Returns:
        Same shape and dtype as `x`.
    """
    if x.ndim == 0:  # a scale has a dimension, and broadcasting would give it to the result
        return affine_fake_quantize(x[None], scale, offset, qmin, qmax, grad_scale, through_rounding)[0]
    grid = Grid(qmin, qmax, through_rounding)
    if asks_for_operations():
        return _by_operations(x, scale, offset, grid, grad_scale)
    return FakeQuantize.apply(x, scale, offset, grid, grad_scale)


def _by_operations(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, factor: float | LSQFactor) -> Tensor:
    """Compute what [`FakeQuantize`] does, by operations whose own gradients, of any order, are the ones it has."""
    if isinstance(factor, LSQFactor):
        with warnings.catch_warnings():
            # A trace keeps the sizes it was made with: only a gradient is scaled by them.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            factor = factor.value(x, scale, grid)
    s = with_gradient_of(scale * factor, scale.clamp_min(SCALE_FLOOR))
    o = None if offset is None else with_gradient_of(offset * factor, offset)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    v = (wide if o is None else wide - o) / s
    outside = (v < grid.qmin) | (v > grid.qmax)
    # Not `v.clamp`: releases of torch differ in its gradient at the ends. And infinity outside is to stay there.
    inside = wide.masked_fill(outside, 0)
    q = torch.where(outside, v.detach().clamp(grid.qmin, grid.qmax), (inside if o is None else inside - o) / s)
    if grid.through_rounding:
        x_q = with_gradient_of(q, q.round()) * s
    else:
        x_q = with_gradient_of(q * s, q.round() * s)
    return (x_q if o is None else x_q + o).to(x.dtype)

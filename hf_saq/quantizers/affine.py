"""The general differentiable quantizer: an affine grid with gradients for step size and offset."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import sum_to


class _Affine(torch.autograd.Function):
    """Saves nothing but its inputs, which are alive anyway."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, factor: float, through_rounding: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.qmin, ctx.qmax, ctx.factor, ctx.through_rounding = qmin, qmax, factor, through_rounding
        s, o = scale.to(x.dtype), offset.to(x.dtype)
        return (x - o).div_(s).round_().clamp_(qmin, qmax).mul_(s).add_(o)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, offset = ctx.saved_tensors
        s, o = scale.to(x.dtype), offset.to(x.dtype)
        v = (x - o).div_(s)
        q = v.clamp(ctx.qmin, ctx.qmax)
        inside = q == v
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1]:
            ds = q.round_().sub_(v.mul_(inside)) if ctx.through_rounding else q.masked_fill_(inside, 0)
            grad_scale = sum_to(ds.mul_(grad), scale.shape).mul_(ctx.factor).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            grad_offset = sum_to(grad.masked_fill(inside, 0), offset.shape).mul_(ctx.factor).to(offset.dtype)
        return grad_x, grad_scale, grad_offset, None, None, None, None


def affine_fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float = 1.0,
    through_rounding: bool = True,
) -> Tensor:
    """`x_q = s * clip(round(v), qmin, qmax) + o` with `v = (x - o)/s`, differentiable in `x`, `s` and `o`.

    With rounding passed straight through, and "inside" meaning `qmin <= v <= qmax`:

        d x_q / d x = 1 inside,              0 outside
        d x_q / d s = round(v) - v inside,   qmin or qmax outside
        d x_q / d o = 0 inside,              1 outside

    Args:
        x: Any shape.
        scale: Step size `s` > 0, `(1,)` or broadcastable against `x`.
        offset: Grid value of code 0, the shape of `scale`.
        grad_scale: Factor on the gradients of `scale` and `offset`.
        through_rounding: Whether the rounding error counts in `d x_q / d s`; if not it is 0 inside, as in PACT.

    Returns:
        Same shape and dtype as `x`.
    """
    return _Affine.apply(x, scale, offset, qmin, qmax, grad_scale, through_rounding)

"""Compute fake quantization and its gradients by the backend that fits, for the autograd function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import sum_to
from . import backend, blocks, compiled, eager
from .formulas import Grid, bounds, fake_quantized, gradient_terms

_is_a_batch = torch._C._functorch.is_legacy_batchedtensor
"""Whether autograd computes many gradients at once (`is_grads_batched`, `jacobian(vectorize=True)`)."""


def quantize_forward(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Compute `fake_quantized` by the backend that fits; same shape, dtype and memory layout as `x`.

    Args:
        scale: Positive, `(1,)` or broadcastable against `x`.
        offset: The shape of `scale`, or `None` for a grid through zero.
    """
    if torch.compiler.is_compiling():
        return fake_quantized(x, scale, offset, *bounds(grid, x))
    result = compiled.forward(x, scale, offset, grid) if backend.compiles(x) else None
    return eager.forward(x, scale, offset, grid) if result is None else result


def quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of `x` and, if `of_scale`, the sum of `gradient_terms` for the scale, in its shape.

    By the backend that fits. The sum is in float32 at least; eager and compiled add in the same order, so that it does
    not matter when `"auto"` begins to compile.
    """
    if (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_a_batch(grad)
    ):  # first: differentiated once more
        grad_x, terms = gradient_terms(
            grad, x, scale, offset, *bounds(grid, x), grid.through_rounding, need_terms=of_scale
        )
        return grad_x, None if terms is None else sum_to(terms, scale.shape)
    if grad.stride() != x.stride():  # one layout for all, and one order of summation
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    result = compiled.backward(grad, x, scale, offset, grid, of_scale) if backend.compiles(x) else None
    if result is None and of_scale and (in_blocks := blocks.backward(grad, x, scale, offset, grid)) is not None:
        grad_x, total = in_blocks
        return grad_x, total.reshape(scale.shape)
    grad_x, terms = eager.backward(grad, x, scale, offset, grid, of_scale) if result is None else result
    if terms is None:
        return grad_x, None
    if scale.numel() > 1:
        return grad_x, sum_to(terms, scale.shape)
    return grad_x, blocks.sum_of_terms(terms).reshape(scale.shape)

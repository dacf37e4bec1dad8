"""Compute fake quantization and its gradients by the backend that fits, for the autograd function."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, compiled, eager
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
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, need_terms: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute `gradient_terms` by the backend that fits."""
    if (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_a_batch(grad)
    ):  # first: differentiated once more
        return gradient_terms(grad, x, scale, offset, *bounds(grid, x), grid.through_rounding, need_terms)
    if grad.stride() != x.stride():  # one layout for all, and one order of summation
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    result = compiled.backward(grad, x, scale, offset, grid, need_terms) if backend.compiles(x) else None
    return eager.backward(grad, x, scale, offset, grid, need_terms) if result is None else result

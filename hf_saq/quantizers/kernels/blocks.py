"""Run the gradient formulas on CPU block by block: what lies between is written to a few buffers that stay in cache.

On whole tensors most operations write a new tensor. Those are larger than the caches, and most of the time goes into
writing them to memory and reading them back.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .eager import just_outside
from .formulas import Grid
from .layouts import in_layout_of, in_memory_order

BLOCK = 2**16
"""Elements of a block for each thread: as many as leave room for the operands in a cache of 2 MB."""


def sum_of_terms(terms: Tensor) -> Tensor:
    """Sum `terms` in float32 at least, `(1,)`. On CPU a sum of the sums of blocks, as [`backward`] has it."""
    dtype = torch.promote_types(terms.dtype, torch.float32)
    flat = in_memory_order(terms) if terms.device.type == "cpu" else None
    if flat is None or flat.numel() == 0:
        return terms.sum(dtype=dtype).reshape(1)
    return _total([block.sum(dtype=dtype) for block in flat.split(_block_size())])


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor] | None:
    """Compute the gradient of `x` and the sum of the terms, `(1,)`, of `formulas.gradient_terms`; for one scale.

    Args:
        grad: Laid out in memory as `x` is.

    Returns:
        `None` where the operands cannot be viewed in blocks.
    """
    if x.device.type != "cpu" or scale.numel() != 1 or x.numel() == 0:
        return None
    if any(type(t) not in (Tensor, nn.Parameter) for t in (grad, x)):  # no DTensor, no fake tensor
        return None
    flat_x, flat_grad = in_memory_order(x), in_memory_order(grad)
    if flat_x is None or flat_grad is None:
        return None
    scale, offset = scale.reshape(1), None if offset is None else offset.reshape(1)
    flat_grad_x = torch.empty_like(flat_grad)
    size = min(_block_size(), x.numel())
    dtype = torch.promote_types(x.dtype, torch.float32)
    buffers = [x.new_empty(size, dtype=dtype) for _ in range(2)]
    sums = []
    for grad_part, x_part, grad_x_part in zip(*(t.split(size) for t in (flat_grad, flat_x, flat_grad_x)), strict=True):
        v, ds = (buffer[: len(x_part)] for buffer in buffers)
        sums.append(_gradient_terms(grad_part, x_part, scale, offset, grid, grad_x_part, v, ds).sum())
    return in_layout_of(x, flat_grad_x), _total(sums)


def _gradient_terms(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, grad_x: Tensor, v: Tensor, ds: Tensor
) -> Tensor:
    """Compute what `eager.backward` does, into `grad_x` and `ds`; `v` is overwritten. Returns `ds`: the terms."""
    if offset is None:
        torch.div(x, scale, out=v)
    else:
        torch.sub(x, offset, out=v).div_(scale)
    low, high = just_outside(grid, v.dtype)
    mask = torch.ops.aten.hardtanh_backward.grad_input
    wide = grad
    if grad.dtype == v.dtype:
        mask(grad, v, low, high, grad_input=grad_x)
    else:
        wide = grad.to(v.dtype)
        grad_x.copy_(mask(wide, v, low, high, grad_input=ds))
    torch.clamp(v, grid.qmin, grid.qmax, out=ds)
    if grid.through_rounding:
        ds.round_()
    return ds.sub_(mask(v, v, low, high, grad_input=v)).mul_(wide)


def _total(sums: list[Tensor]) -> Tensor:
    return cast(Tensor, sums[0] if len(sums) == 1 else torch.stack(sums).sum()).reshape(1)


def _block_size() -> int:
    return BLOCK * torch.get_num_threads()

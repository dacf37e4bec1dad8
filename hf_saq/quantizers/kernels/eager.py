"""Run the formulas as eager torch operations, chosen and ordered for few passes over memory and few temporaries."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .formulas import Grid


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Compute `formulas.fake_quantized`."""
    x_q = _place(x, scale, offset).round_().clamp_(grid.qmin, grid.qmax).mul_(scale)
    return (x_q if offset is None else x_q.add_(offset)).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, need_terms: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute `formulas.gradient_terms`."""
    # `hardtanh_backward(a, v, low, high)` is `a` where `low < v < high` and 0 elsewhere, in one pass and without a
    # mask: a product with a boolean mask takes several times as long, since the mask is first converted.
    v = _place(x, scale, offset)
    low, high = just_outside(grid, v.dtype)
    wide = grad.to(v.dtype)
    mask = torch.ops.aten.hardtanh_backward
    grad_x = mask(wide, v, low, high).to(grad.dtype)
    if not need_terms:
        return grad_x, None
    ds = v.clamp(grid.qmin, grid.qmax)
    if grid.through_rounding:
        ds = ds.round_().sub_(mask(v, v, low, high))
    else:
        ds = ds.sub_(mask(v, v, low, high))
    return grad_x, ds.mul_(wide)


def _place(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    if offset is not None:
        return (x - offset).div_(scale)
    return x / scale


@functools.lru_cache(maxsize=128)
def just_outside(grid: Grid, dtype: torch.dtype) -> tuple[float, float]:
    """Find the numbers next to `qmin` and `qmax` on the far side: `hardtanh_backward` counts its bounds as outside."""
    kind = np.float64 if dtype == torch.float64 else np.float32  # not by torch: fake tensors have no number to read
    low, high = np.nextafter(kind(grid.qmin), kind(-np.inf)), np.nextafter(kind(grid.qmax), kind(np.inf))
    return float(low), float(high)

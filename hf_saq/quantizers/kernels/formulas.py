"""Define the formulas of fake quantization and of its gradients, as plain torch operations.

Everything is computed in float32 at least, whatever the type of the input: in bfloat16 `x / s` alone is off by up to
half a code at 8 bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Grid(NamedTuple):
    """Holds the smallest and largest code of a grid, and what its gradients count."""

    qmin: int
    qmax: int
    through_rounding: bool = True
    """Whether the rounding error counts in the gradient of the scale."""


def fake_quantized(x: Tensor, scale: Tensor, offset: Tensor | None, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Compute `s * clip(round(v), qmin, qmax) + o` with `v = (x - o) / s`."""
    x_q = _place(x, scale, offset).round().clamp(qmin, qmax) * scale
    return (x_q if offset is None else x_q + offset).to(x.dtype)


def gradient_terms(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: Tensor,
    qmax: Tensor,
    through_rounding: bool,
    need_terms: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of `x`, and what sums up to that of the scale: `grad * d x_q / d s` of each element.

    `d x_q / d s` is `round(v) - v` inside (Eq. 3 of LSQ), or 0 if not `through_rounding`; outside the clip bound.
    """
    v = _place(x, scale, offset)
    outside = (v < qmin) | (v > qmax)
    grad_x = torch.where(outside, 0, grad)
    if not need_terms:
        return grad_x, None
    q = v.clamp(qmin, qmax)
    ds = q.round() - torch.where(outside, 0, v) if through_rounding else torch.where(outside, q, 0)
    return grad_x, ds * grad


def bounds(grid: Grid, x: Tensor) -> tuple[Tensor, Tensor]:
    """Make tensors of `qmin` and `qmax`: compiled code would specialise on numbers, one compilation for each."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():
        low, high = (torch.full((), q, dtype=dtype, device=x.device) for q in (grid.qmin, grid.qmax))
        return low, high
    if type(x) not in (Tensor, nn.Parameter) or _get_current_dispatch_mode() is not None:
        # Keep none that are made among fake tensors: they would be handed out to real ones.
        return x.new_full((), grid.qmin, dtype=dtype), x.new_full((), grid.qmax, dtype=dtype)
    return _bound_tensors(grid.qmin, grid.qmax, dtype, x.device)


@functools.lru_cache(maxsize=128)
def _bound_tensors(qmin: int, qmax: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        low, high = torch.tensor([qmin, qmax], dtype=dtype, device=device)
    return low, high


def _place(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Compute `v = (x - o) / s`, the code before rounding, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x if offset is None else x - offset) / scale

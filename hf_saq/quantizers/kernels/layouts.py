"""View tensors of any dense layout with one dimension that runs through their memory, and back."""

from __future__ import annotations

from torch import Tensor


def in_memory_order(t: Tensor) -> Tensor | None:
    """View `t` with one dimension that runs through its memory; `None` if it has gaps or overlaps."""
    if t.is_contiguous():
        return t.view(-1)
    order = sorted(range(t.ndim), key=lambda d: (t.stride(d), t.shape[d]), reverse=True)
    t = t.permute(order)
    return t.view(-1) if t.is_contiguous() else None


def in_layout_of(x: Tensor, flat: Tensor) -> Tensor:
    """View a result of flattened operands in the shape and layout of `x`."""
    return flat.view(x.shape) if x.is_contiguous() else flat.as_strided(x.shape, x.stride())

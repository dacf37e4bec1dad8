"""Compute a quantized input again in the backward pass, from what its quantizer saved, and do not keep it until then.

The quantizer saves its input `x`, in most models alive anyway; the product behind it would save `x_q`, of the same
size, once per layer. One more pass over memory in the backward is little beside the product itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..quantizers.affine import MadeOf, made_of


def in_autocast_type(x_q: Tensor) -> Tensor:
    """Convert `x_q` to the type that a product takes under autocast: a cast that is ours can be done again."""
    device = x_q.device.type
    if x_q.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return x_q.to(torch.get_autocast_dtype(device))
    return x_q


def operand_recomputed(x_q: Tensor, operand: Tensor) -> AbstractContextManager:
    """Let operations inside that would save `operand`, or a view of it, save how to compute it again instead.

    Hooks on saved tensors that are active outside (checkpointing, offloading, counting) get all other tensors.

    Args:
        x_q: Output of a quantizer. The context does nothing if a hook changed it or if nothing needs a gradient.
        operand: `x_q` itself, or `x_q` in another type.
    """
    # A compiler decides itself what to recompute.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _hooks_are_possible():
        return nullcontext()
    made = made_of(x_q)
    x = None if made is None else made.x()
    return nullcontext() if made is None or x is None else _hooks(made, x, operand)


def active_hooks() -> Any:
    """Return what tensors saved for the backward pass go through now; `None` if nothing, or if it cannot be told."""
    if torch.compiler.is_compiling() or not _hooks_are_possible():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _hooks_are_possible() -> bool:
    # Without this function, which torch keeps to itself, what is active outside cannot be asked for.
    return (
        hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
        and torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
    )


def _hooks(made: MadeOf, x: Tensor, operand: Tensor) -> saved_tensors_hooks:
    outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(False) or (Tensor.detach, None)
    storage, dtype = operand.untyped_storage()._cdata, operand.dtype  # not its address: fake tensors have none
    layout = (operand.size(), operand.stride())

    def pack(t: Tensor) -> Any:
        if t.untyped_storage()._cdata != storage or t.dtype != dtype or t.numel() == 0:
            return outer_pack(t)
        # Packed once more rather than taken from the quantizer: checkpointing hands out each saved tensor once.
        return _Recipe(made, outer_pack(x), dtype, layout, (t.size(), t.stride(), t.storage_offset()))

    def unpack(packed: Any) -> Tensor:
        recipe = packed if isinstance(packed, _Recipe) else None
        t = packed if recipe is None else recipe.packed_x
        t = t if outer_unpack is None else outer_unpack(t)
        return t if recipe is None else recipe.cook(t)

    return saved_tensors_hooks(pack, unpack)


class _Recipe(NamedTuple):
    """Says how to make a view of a quantized input again."""

    made: MadeOf
    packed_x: Any
    dtype: torch.dtype
    layout: tuple[Any, Any]  # size, stride
    view: tuple[Any, Any, Any]  # size, stride, offset

    def cook(self, x: Tensor) -> Tensor:
        operand = self.made.remake(x).to(self.dtype)
        size, stride = self.layout
        if operand.stride() != stride:  # `save_on_cpu(pin_memory=True)` brings every tensor back contiguous
            operand = torch.empty_strided(size, stride, dtype=self.dtype, device=x.device).copy_(operand)
        assert operand.size() == size and operand.storage_offset() == 0
        return operand if self.view == (*self.layout, 0) else operand.as_strided(*self.view)

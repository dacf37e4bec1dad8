"""Run the formulas compiled by `torch.compile`, on views that let all shapes share compiled code.

Types, the shape of scales and what is asked for do need code of their own. Of these kinds of use there are more than
the eight (`torch._dynamo.config.recompile_limit`) that torch lets one function have, as soon as quantizers are
compared. It counts them by code object, so that each kind gets one.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from .backend import give_up, leave_uncompiled
from .formulas import Grid, bounds, fake_quantized, gradient_terms
from .layouts import in_layout_of, in_memory_order

_NOTHING = contextlib.nullcontext()


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor | None:
    """Compute `formulas.fake_quantized`; `None` where compiled code cannot."""
    flat = _flattened([x], scale, offset)
    if flat is None:
        return None
    (flat_x,), scale, offset = flat
    formula = _of_one_kind(fake_quantized, *_kind(flat_x, scale, offset))
    result = _attempt(formula, flat_x, scale, offset, *bounds(grid, x))
    return None if result is None else in_layout_of(x, result)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, need_terms: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Compute `formulas.gradient_terms`; `None` where compiled code cannot."""
    flat = _flattened([grad, x], scale, offset)
    if flat is None:
        return None
    operands, scale, offset = flat
    flags = grid.through_rounding, need_terms
    formula = _of_one_kind(gradient_terms, *_kind(operands[-1], scale, offset), *flags)
    result = _attempt(formula, *operands, scale, offset, *bounds(grid, x), *flags)
    if result is None:
        return None
    grad_x, terms = result
    return in_layout_of(x, grad_x), None if terms is None else in_layout_of(x, terms)


def _flattened(
    operands: Sequence[Tensor], scale: Tensor, offset: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None] | None:
    """View all operands with one or two dimensions in the order of memory, so that shapes share compiled code.

    Operands have one shape and one order of strides. One dimension for a scale per tensor; two, `(channels, rest)` or
    `(rest, channels)`, for a scale along the first or last dimension. `None` where there is no such view.
    """
    x = operands[-1]
    if scale.numel() == 1:
        flat = [in_memory_order(t) for t in operands]
        shape: tuple[int, ...] = (1,)
    else:
        shape = (-1, 1) if scale.ndim == x.ndim and scale.shape[0] == scale.numel() else (1, -1)
        if x.ndim < 2 or (shape == (1, -1) and scale.shape[-1] != scale.numel()):
            return None
        axis = 0 if shape == (-1, 1) else x.ndim - 1
        if axis == 0:
            flat = [t.flatten(1) if t.is_contiguous() else None for t in operands]
        else:
            flat = [t.flatten(0, -2) if t.is_contiguous() else None for t in operands]
    if any(t is None for t in flat):
        return None
    views = [cast(Tensor, t).detach() for t in flat]
    return views, scale.detach().reshape(shape), None if offset is None else offset.detach().reshape(shape)


def _kind(x: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Hashable, ...]:
    """Say which operands share compiled code."""
    return x.dtype, x.device, x.ndim, scale.shape[0] == 1, offset is None


@functools.cache
def _of_one_kind(formula: types.FunctionType, *kind: Hashable) -> Callable:  # noqa: ARG001 (each has its copy)
    """Copy `formula`, with a code object of its own."""
    return types.FunctionType(formula.__code__.replace(), formula.__globals__, formula.__name__)


@functools.cache
def _compiled(formula: Callable) -> Callable:
    import torch._inductor.config as inductor

    # Triton divides approximately unless told otherwise, which moves values across rounding edges.
    exact = "eager_numerics.division_rounding"
    options: dict[str, str | int | bool | Callable] = {exact: True} if hasattr(inductor, "eager_numerics") else {}
    return torch.compile(formula, dynamic=True, fullgraph=True, options=options)


_left_uncompiled: set[Callable] = set()
"""Kinds for which torch refuses to compile again."""


def _attempt(formula: Callable, *args):
    """Run the formula of one kind compiled; `None`, with one warning, if that is not possible."""
    if formula in _left_uncompiled:
        return None
    device = args[0].device.type
    try:
        # Compiled code is bound to the mode that it was compiled in: one mode, one compilation.
        with torch.no_grad(), torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING:
            return _compiled(formula)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
            _left_uncompiled.add(formula)
            leave_uncompiled()
        else:
            give_up(error)
        return None

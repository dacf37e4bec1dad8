"""The arithmetic of fake quantization in few passes over memory: eager, or compiled by `torch.compile`.

The formulas stand once, in [`fake_quantized`] and [`gradient_terms`]: autograd's double backward and a surrounding
`torch.compile` run them as they are. Two backends compute the same values faster:

- `"eager"`: ordinary torch operations, chosen and ordered for few passes and few temporaries.
- `"compiled"`: one pass, by inductor (C++ on CPU, Triton on CUDA). On CPU its results are those of eager bit for bit,
  because the sum for the gradient of the scale stays outside. It compiles once per kind of use, not per shape.

`"auto"`, the default, compiles where it pays and never on CPU before this process has quantized `PAYS_AFTER` elements,
so that tests and short runs do not wait for a compiler. Wherever compilation is not possible, eager takes over.

Everything is computed in float32 at least, whatever the type of the input: in bfloat16 `x / s` alone is off by up to
half a code at 8 bits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

Backend = Literal["auto", "eager", "compiled"]

VARIABLE = "HF_SAQ_KERNELS"
"""Environment variable with the name of the backend; `set_backend` overrides it."""
SMALLEST = 2**16
"""Elements from which `"auto"` may compile: below, the overhead of a compiled call (0.06 ms) eats what it saves."""
PAYS_AFTER = 2**35
"""Elements, counted in tensors of at least `SMALLEST`, after which `"auto"` compiles on CPU. Where vectors are wide,
compiled code saves 0.2 to 0.3 ns for each of them (a step of ViT-S/16 has 244 million; docs/cost.md), so that by then
a compilation of ten seconds would have been worth it."""


class Grid(NamedTuple):
    """The codes of a grid and what its gradients count."""

    qmin: int
    qmax: int
    through_rounding: bool = True
    """Whether the rounding error counts in the gradient of the scale."""


# The formulas ------------------------------------------------------------------------------------------------------


def _place(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """`v = (x - o) / s`, the code before rounding, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x if offset is None else x - offset) / scale


def fake_quantized(x: Tensor, scale: Tensor, offset: Tensor | None, qmin: Tensor, qmax: Tensor) -> Tensor:
    """`s * clip(round(v), qmin, qmax) + o` with `v = (x - o) / s`."""
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
    """The gradient of `x`, and what sums up to that of the scale: `grad * d x_q / d s` of each element.

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


# What the autograd function calls ----------------------------------------------------------------------------------


def quantize_forward(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """`fake_quantized` by the backend that fits; same shape, dtype and memory layout as `x`.

    Args:
        scale: Positive, `(1,)` or broadcastable against `x`.
        offset: The shape of `scale`, or `None` for a grid through zero.
    """
    if torch.compiler.is_compiling():
        return fake_quantized(x, scale, offset, *_bounds(grid, x))
    if _compiles(x):
        flat = _flattened([x], scale, offset)
        if flat is not None:
            (flat_x,), *values = flat
            result = _attempt(fake_quantized, flat_x, *values, *_bounds(grid, x))
            if result is not None:
                return _as(result, x)
    return _eager_forward(x, scale, offset, grid)


def quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, need_terms: bool
) -> tuple[Tensor, Tensor | None]:
    """`gradient_terms` by the backend that fits."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # the former: differentiated once more
        return gradient_terms(grad, x, scale, offset, *_bounds(grid, x), grid.through_rounding, need_terms)
    if grad.stride() != x.stride():  # one layout for all, and one order of summation
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    if _compiles(x):
        flat = _flattened([grad, x], scale, offset)
        if flat is not None:
            operands, *values = flat
            result = _attempt(gradient_terms, *operands, *values, *_bounds(grid, x), grid.through_rounding, need_terms)
            if result is not None:
                grad_x, terms = result
                return _as(grad_x, x), None if terms is None else _as(terms, x)
    return _eager_backward(grad, x, scale, offset, grid, need_terms)


def _bounds(grid: Grid, x: Tensor) -> tuple[Tensor, Tensor]:
    """`qmin` and `qmax` as tensors: compiled code would specialise on numbers, one compilation for each."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():
        low, high = (torch.full((), q, dtype=dtype, device=x.device) for q in (grid.qmin, grid.qmax))
        return low, high
    return _bound_tensors(grid.qmin, grid.qmax, dtype, x.device)


@functools.lru_cache(maxsize=128)
def _bound_tensors(qmin: int, qmax: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        low, high = torch.tensor([qmin, qmax], dtype=dtype, device=device)
    return low, high


# Eager -------------------------------------------------------------------------------------------------------------


def _eager_place(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    if offset is not None:
        return (x - offset).div_(scale)
    return x / scale


def _eager_forward(x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    x_q = _eager_place(x, scale, offset).round_().clamp_(grid.qmin, grid.qmax).mul_(scale)
    return (x_q if offset is None else x_q.add_(offset)).to(x.dtype)


@functools.lru_cache(maxsize=128)
def _just_outside(grid: Grid, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers next to `qmin` and `qmax` on the far side: `hardtanh_backward` counts its bounds as outside."""
    infinity = torch.tensor(torch.inf, dtype=dtype)
    low, high = torch.tensor([grid.qmin, grid.qmax], dtype=dtype)
    return torch.nextafter(low, -infinity).item(), torch.nextafter(high, infinity).item()


def _eager_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, need_terms: bool
) -> tuple[Tensor, Tensor | None]:
    # `hardtanh_backward(a, v, low, high)` is `a` where `low < v < high` and 0 elsewhere, in one pass and without a
    # mask: a product with a boolean mask takes several times as long, since the mask is first converted.
    v = _eager_place(x, scale, offset)
    low, high = _just_outside(grid, v.dtype)
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


# Compiled ----------------------------------------------------------------------------------------------------------


def _initial() -> Backend:
    name = os.environ.get(VARIABLE, "auto")
    if name not in get_args(Backend):
        raise ValueError(f"{VARIABLE}={name!r}; expected one of {list(get_args(Backend))}.")
    return cast(Backend, name)


_backend: Backend = _initial()
_quantized_elements = 0
_impossible = False
_NOTHING = contextlib.nullcontext()


def set_backend(name: Backend) -> Backend:
    """Choose how fake quantization is computed, in this process and from now on.

    Args:
        name: `"eager"`, `"compiled"` (from the first call on and at any size) or `"auto"`, see the module.

    Returns:
        The name of the backend before.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"set_backend({name!r}): expected one of {list(get_args(Backend))}.")
    before, _backend = _backend, name
    return before


def _compiles(x: Tensor) -> bool:
    """Whether this call goes to compiled code."""
    global _quantized_elements
    if _backend == "eager" or _impossible:
        return False
    size = x.numel()
    if _backend == "auto":
        if size < SMALLEST:
            return False
        if x.device.type == "cpu" and _quantized_elements < PAYS_AFTER:
            _quantized_elements += size
            return False
    return (
        size > 1
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.device.type in ("cpu", "cuda")
        and type(x) in (Tensor, nn.Parameter)  # no DTensor, no fake tensor
        # Neither a counter of operations nor a functional transform nor `torch.device` as a context.
        and _get_current_dispatch_mode() is None
        and _get_current_function_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _flattened(
    operands: Sequence[Tensor], scale: Tensor, offset: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None] | None:
    """All operands as views with one or two dimensions in the order of memory, so that shapes share compiled code.

    Operands have one shape and one order of strides. One dimension for a scale per tensor; two, `(channels, rest)` or
    `(rest, channels)`, for a scale along the first or last dimension. `None` where there is no such view.
    """
    x = operands[-1]
    if scale.numel() == 1:
        flat = [_in_memory_order(t) for t in operands]
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


def _in_memory_order(t: Tensor) -> Tensor | None:
    """`t` as a view with one dimension that runs through its memory; `None` if it has gaps or overlaps."""
    if t.is_contiguous():
        return t.view(-1)
    order = sorted(range(t.ndim), key=lambda d: (t.stride(d), t.shape[d]), reverse=True)
    t = t.permute(order)
    return t.view(-1) if t.is_contiguous() else None


def _as(flat: Tensor, x: Tensor) -> Tensor:
    """A result of flattened operands in the shape and layout of `x`."""
    return flat.view(x.shape) if x.is_contiguous() else flat.as_strided(x.shape, x.stride())


@functools.cache
def _compiled(formula: Callable) -> Callable:
    import torch._inductor.config as inductor

    # Triton divides approximately unless told otherwise, which moves values across rounding edges.
    exact = "eager_numerics.division_rounding"
    options: dict[str, str | int | bool | Callable] = {exact: True} if hasattr(inductor, "eager_numerics") else {}
    return torch.compile(formula, dynamic=True, fullgraph=True, options=options)


def _attempt(formula: Callable, *args):
    """The formula compiled; `None`, with one warning in the life of the process, if that is not possible."""
    global _impossible
    device = args[0].device.type
    try:
        # Compiled code is bound to the mode that it was compiled in: one mode, one compilation.
        with torch.no_grad(), torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING:
            return _compiled(formula)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _impossible = True
        warnings.warn(
            f"hf_saq: fake quantization runs uncompiled, which is slower: torch.compile failed with "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '(no message)'}. "
            f"Install a C++ compiler (CPU) or Triton (CUDA), or set {VARIABLE}=eager to silence this.",
            stacklevel=2,
        )
        return None

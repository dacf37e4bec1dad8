"""Keep grids in float32 where the model around them goes to bfloat16 or float16, and add up in float64.

A step size in bfloat16 is off by up to 0.4 %: at 8 bits that moves the outer codes by half a step, and a model that is
converted and converted back would have other grids than before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def without_narrowing(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap what `nn.Module._apply` does to each tensor, so that no value is lost.

    Moves between devices and widening (to float64) pass through. Where `convert` would give a type narrower than
    float32, the tensor moves to the device of the result, in float32 at least and without being rounded on the way;
    integers stay the integers they are.
    """

    def convert_keeping_values(t: Tensor) -> Tensor:
        converted = convert(t)
        dtype = torch.promote_types(converted.dtype, torch.float32) if t.is_floating_point() else t.dtype
        return converted if converted.dtype == dtype else t.to(converted.device, dtype)

    return convert_keeping_values


def where_double_is(t: Tensor) -> Tensor:
    """Return `t` on its device, or on the CPU where that has no double precision (Apple's `mps`)."""
    return t.cpu() if t.device.type == "mps" else t


def in_double(t: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device of `t` has no such numbers."""
    return where_double_is(t).double()

"""Hold the settings of a quantizer in one value, which constructors take, copies pass on, and layers read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

MIN_BITS, MAX_BITS = 2, 8

Role = Literal["weight", "activation"]
ScaleInit = Literal["mse", "mean"]


def check_bits(where: str, bits: Any, none_is_float: bool = False) -> None:
    """Raise `ValueError` unless `bits` is an integer from 2 to 8.

    Args:
        where: What the message starts with: the name of the value.
        none_is_float: Whether `None` is possible too.
    """
    if bits is None and none_is_float:
        return
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        or_none = ", or None for float" if none_is_float else ""
        raise ValueError(f"{where}={bits!r}; expected an integer from {MIN_BITS} to {MAX_BITS}{or_none}.")


@dataclass(frozen=True)
class QuantizerSettings:
    """Says what a quantizer is to do; the values that it learns are no part of it. Checked when built.

    Attributes:
        bits: Width of a code, 2 to 8.
        role: `"weight"` (statistics over the whole tensor) or `"activation"` (dimension 0 is the batch).
        signed: Whether codes are `[-2^(b-1), 2^(b-1)-1]` or `[0, 2^b-1]`. `None` leaves it to the first data that the
            quantizer sees: signed if a value is negative. A quantizer with the mode `"affine"` learns an offset then.
        scale_shape: Shape of the step size: `(1,)` for one per tensor (not a scalar: FSDP2 cannot shard those), or a
            shape that broadcasts against the tensor, such as `(out, 1)` or `(out, 1, 1, 1)`, for one per channel.
        scale_init: `"mean"` for the closed form of the quantizer's paper, `"mse"` for a search of the step size with
            the smallest squared error.
    """

    bits: int
    role: Role
    signed: bool | None = True
    scale_shape: tuple[int, ...] = (1,)
    scale_init: ScaleInit = "mse"

    def __post_init__(self) -> None:
        check_bits("QuantizerSettings.bits", self.bits)
        for name, choices in (("role", get_args(Role)), ("scale_init", get_args(ScaleInit))):
            if getattr(self, name) not in choices:
                raise ValueError(f"QuantizerSettings.{name}={getattr(self, name)!r}; expected one of {list(choices)}.")
        if self.signed is not None and not isinstance(self.signed, bool):
            raise ValueError(f"QuantizerSettings.signed={self.signed!r}; expected True, False or None.")
        shape = self.scale_shape
        if not isinstance(shape, (tuple, list)) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(
                f"QuantizerSettings.scale_shape={shape!r}; expected positive integers, (1,) for one scale per tensor."
            )
        object.__setattr__(self, "scale_shape", tuple(shape))

"""The contract every quantizer keeps, and straight-through rounding.

A quantizer maps a float tensor onto a uniform grid. Every grid here is affine: `value = code * scale + offset` with
integer codes in `[qmin, qmax]`, so that packing, export and reports need no knowledge of the quantizer's kind. What a
quantizer does to a tensor before rounding (standardise, squash) stays inside `quantize` and `fake_quantize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

MIN_BITS, MAX_BITS = 2, 8
SCALE_FLOOR = 1e-7
"""A learned step size is used as `max(scale, SCALE_FLOOR)`: it never divides by zero and never turns negative.

About the smallest number that is not zero in float16, the type an activation may have."""

_NOT_INITIALIZED, _UNSIGNED, _SIGNED = -1, 0, 1

Role = Literal["weight", "activation"]
ScaleInit = Literal["mean", "mse"]


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004 (autograd's signature)
        return x.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class _FloorStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clamp_min(SCALE_FLOOR)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded (Bengio et al., arXiv:1308.3432)."""
    return _RoundStraightThrough.apply(x)


def positive(scale: Tensor) -> Tensor:
    """`max(scale, SCALE_FLOOR)` with an identity gradient, so that a scale pushed below the floor can come back."""
    return _FloorStraightThrough.apply(scale)


def shared_dimensions(x: Tensor, scale_shape: tuple[int, ...]) -> list[int]:
    """Dimensions of `x` along which the elements share one entry of a scale of shape `scale_shape`."""
    return [d for d in range(x.ndim) if len(scale_shape) != x.ndim or scale_shape[d] == 1]


def mean_and_std(x: Tensor, scale_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) standard deviation of the elements that share one scale, detached, each `scale_shape`."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    shared = shared_dimensions(x, scale_shape)
    count = max(x.numel() // torch.Size(scale_shape).numel(), 1)
    std, mean = torch.std_mean(x, dim=shared, correction=min(1, count - 1))  # one element alone deviates by zero
    return mean.reshape(scale_shape), std.reshape(scale_shape)


def sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum `x` down to `shape`, which broadcasts against it, in float32 at least and without a copy in that type."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if shape.numel() == 1:
        return x.sum(dtype=dtype).reshape(shape)
    return x.sum(dim=shared_dimensions(x, tuple(shape)), keepdim=True, dtype=dtype).reshape(shape)


class Quantizer(nn.Module, ABC):
    """Fake-quantizes a tensor: `forward(x)` returns the nearest grid values, differentiable in `x` and the scale.

    The learnable values exist from construction on, so that an optimizer built early still sees them; they are
    meaningless until [`initialize`] has seen data, and `forward` refuses to run before.

    Args:
        bits: Width of a code, 2 to 8.
        role: `"weight"` (statistics over the whole tensor) or `"activation"` (dimension 0 is the batch).
        signed: Whether codes are `[-2^(b-1), 2^(b-1)-1]` or `[0, 2^b-1]`. `None` lets [`initialize`] decide from the
            smallest value it sees; a quantizer with the mode `"affine"` learns an offset instead.
        scale_shape: Shape of the step size: `(1,)` for one per tensor (not a scalar: FSDP2 cannot shard those), or a
            shape that broadcasts against the tensor, such as `(out, 1)` or `(out, 1, 1, 1)`, for one per channel.
        scale_init: `"mean"` for the closed form of the quantizer's paper, `"mse"` for a search of the step size with
            the smallest squared error.

    Attributes:
        path (`str`): Dotted name of this quantizer inside its model, for error messages.
        observer: While set, `forward` shows it the input and returns the input unchanged (used by `calibrate`).
        given_output: While set to `(x, y)`, the next `fake_quantize` of that very `x` returns `y`, which somebody has
            computed already, with the gradients of `Q(x)`. Only where the class has `output_can_be_given`.
    """

    range_state: Tensor
    activation_modes: ClassVar[tuple[str, ...]] = ("auto", "signed", "unsigned")
    """Values of `activation_mode` that this kind of quantizer can do."""
    has_offset: bool = False
    """Whether `grid` has an offset other than zero, which a packed layer must then store."""
    output_can_be_given: ClassVar[bool] = False
    """Whether `fake_quantize` looks at `given_output`."""

    def __init__(
        self,
        bits: int,
        role: Role,
        signed: bool | None = True,
        scale_shape: tuple[int, ...] = (1,),
        scale_init: ScaleInit = "mse",
    ):
        super().__init__()
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"{type(self).__name__}: bits={bits}; expected an integer from {MIN_BITS} to {MAX_BITS}.")
        self.bits = bits
        self.role: Role = role
        self.requested_signed = signed
        self.signed: bool = bool(signed)
        self.scale_shape = tuple(scale_shape)
        self.scale_init: ScaleInit = scale_init
        self.initialized = False
        self.path = ""
        self.observer: Observer | None = None
        self.given_output: tuple[Tensor, Tensor] | None = None
        # -1 not initialized, 0 unsigned, 1 signed: what the state dict must carry besides the learned values.
        self.register_buffer("range_state", torch.tensor(_NOT_INITIALIZED, dtype=torch.int8))

    # What a quantizer implements -------------------------------------------------------------------------------

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """The grid value nearest to each element, same shape and dtype as `x`, with the quantizer's gradients."""

    @abstractmethod
    def fit(self, x: Tensor) -> None:
        """Set the learnable values, in place, from a sample `x` of what will be quantized."""

    @abstractmethod
    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(scale, offset)`, detached, each of shape `scale_shape`: `value = code * scale + offset`.

        Args:
            x: The tensor that is quantized. Only a grid that depends on its statistics needs it (LIQ weights).
        """

    # What all quantizers share -----------------------------------------------------------------------------------

    @property
    def qmin(self) -> int:
        """Smallest integer code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.update(x)
            return x
        if not self.initialized:
            raise RuntimeError(
                f"{self.path or type(self).__name__}: this {self.role} quantizer has no range yet. Run "
                "`hf_saq.calibrate(model, batches)` with a few batches of model inputs, or train with `SAQTrainer`, "
                "which calibrates from its training data."
            )
        return self.fake_quantize(x)

    def take_given_output(self, x: Tensor) -> Tensor | None:
        """What was given for `x`, once."""
        if self.given_output is None or self.given_output[0] is not x:
            return None
        _, given = self.given_output
        self.given_output = None
        return given

    @torch.no_grad()
    def initialize(self, x: Tensor, minimum: float | None = None) -> None:
        """Decide the sign (if it was left open) and the first learnable values from the sample `x`.

        Args:
            x: The weight, or a 1-d sample of activations.
            minimum: Smallest value seen, where `x` is only a part of the data. Defaults to `x.min()`.
        """
        if x.numel() == 0 or not torch.isfinite(x).all():
            found = "an empty tensor" if x.numel() == 0 else "infinite or NaN values"
            raise ValueError(f"{self.path or type(self).__name__}: cannot fit a range to {found}; check the inputs.")
        signed = self.requested_signed
        if signed is None:
            signed = (x.min().item() if minimum is None else minimum) < 0
        self.take_state(signed)
        self.fit(x)

    @torch.no_grad()
    def take_state(self, signed: bool) -> None:
        """From here on initialized, with codes of this sign."""
        self.range_state.fill_(_SIGNED if signed else _UNSIGNED)
        self.refresh()

    def refresh(self) -> None:
        """Read the sign and "initialized" back from the stored state, after something wrote to the buffers."""
        if self.range_state.is_meta:
            return
        state = int(self.range_state)
        if state not in (_NOT_INITIALIZED, _UNSIGNED, _SIGNED):
            raise ValueError(
                f"{self.path}.range_state is {state}; expected -1 (not calibrated), 0 (unsigned) or 1 (signed). "
                "The checkpoint is damaged or was written by something else."
            )
        self.initialized = state != _NOT_INITIALIZED
        if self.initialized:
            self.signed = state == _SIGNED

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the range: `forward` raises until [`initialize`] is called."""
        for parameter in self.parameters(recurse=False):
            parameter.fill_(1.0)
        self.range_state.fill_(_NOT_INITIALIZED)
        self.refresh()

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Integer codes of `x` in `[qmin, qmax]`, dtype int16: those behind `fake_quantize(x)`."""
        scale, offset = self.grid(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as `fake_quantize` computes
        return ((x - offset) / scale).round().clamp(self.qmin, self.qmax).to(torch.int16)

    def take_over(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:  # noqa: ARG002
        """A weight that quantizes to `codes` on the grid `code * scale + offset`, which becomes this quantizer's own.

        What unpacking needs; the inverse of `quantize` and `grid`, as far as there is one.

        Args:
            codes: Integer codes of a weight, of any shape.
            scale: Step size of shape `scale_shape`.
            offset: Value of code 0, of shape `scale_shape`.
        """
        raise ValueError(f"{self.path or type(self).__name__}: a {type(self).__name__} cannot be unpacked.")

    def blank_copy(self) -> Quantizer:
        """A quantizer with the settings of this one and none of its values, on torch's default device."""
        new = type(self)(self.bits, self.role, self.requested_signed, self.scale_shape, self.scale_init)
        new.path = self.path
        return new

    @torch.no_grad()
    def dequantize(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        """Grid values of integer `codes`, in the dtype of the scale. `x` is for `grid`, see there."""
        scale, offset = self.grid(x)
        return codes.to(scale.dtype) * scale + offset

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def extra_repr(self) -> str:
        sign = {True: "signed", False: "unsigned"}[self.signed] if self.initialized else "not calibrated"
        offset = ", offset" if self.has_offset else ""
        return f"bits={self.bits}, {sign}{offset}, scale={'tensor' if self.scale_shape == (1,) else 'channel'}"


class Observer(ABC):
    """Sees what would have been quantized while a model runs in float."""

    @abstractmethod
    def update(self, x: Tensor) -> None: ...

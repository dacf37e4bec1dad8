"""Define the contract that every quantizer keeps.

A quantizer maps a float tensor onto a uniform grid. Every grid here is affine: `value = code * scale + offset` with
integer codes in `[qmin, qmax]`, so that packing, export and reports need no knowledge of the quantizer's kind. What a
quantizer does to a tensor before rounding (standardise, squash) stays inside `quantize` and `fake_quantize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from .precision import without_narrowing
from .range_state import NOT_CALIBRATED, SIGNED, HasRangeState
from .settings import QuantizerSettings, Role, ScaleInit

_HOW_TO_GET_A_RANGE: dict[Role, str] = {
    "activation": "Run `hf_saq.calibrate(model, batches)` with a few batches of model inputs, or train with "
    "`SAQTrainer`, which calibrates from its training data.",
    "weight": "Its weight had no values when it was quantized (device='meta'), or was loaded in shards: load a state "
    "dict into the whole model, or quantize the model once it has its values.",
}


class Quantizer(HasRangeState, ABC):
    """Fake-quantizes a tensor: `forward(x)` returns the nearest grid values, differentiable in `x` and the scale.

    The learnable values exist from construction on, so that an optimizer built early still sees them; they are NaN
    until [`initialize`] has seen data, and `forward` refuses to run before. They stay in float32 at least,
    also where the model around them goes to bfloat16.

    Args:
        settings: Bits, role, sign, shape and first value of the scale.

    Attributes:
        observer: While set, `forward` shows it the input and returns the input unchanged (used by `calibrate`).
    """

    learned: bool = True
    """Whether training moves its values; else they stay as calibrated ([`keep_as_calibrated`])."""

    activation_modes: ClassVar[tuple[str, ...]] = ("auto", "signed", "unsigned")
    """Values of `activation_mode` that this kind of quantizer can do."""

    def __init__(self, settings: QuantizerSettings):
        if not isinstance(settings, QuantizerSettings):
            raise TypeError(
                f"{type(self).__name__}: settings={settings!r}; expected a QuantizerSettings, for example "
                "QuantizerSettings(bits=4, role='weight')."
            )
        super().__init__()
        self.settings = settings
        self.observer: Observer | None = None

    # What a quantizer implements -------------------------------------------------------------------------------

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return the grid value nearest to each element, in shape and dtype of `x`, with the quantizer's gradients."""

    @abstractmethod
    def fit(self, x: Tensor) -> None:
        """Set the learnable values, in place, from a sample `x` of what will be quantized, in float32 at least."""

    @abstractmethod
    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `(scale, offset)`, detached, each of shape `scale_shape`: `value = code * scale + offset`.

        Args:
            x: The tensor that is quantized. Only a grid that depends on its statistics needs it (LIQ weights).
        """

    @property
    def has_offset(self) -> bool:
        """Tell whether `grid` has an offset other than zero, which a packed layer must then store."""
        return False

    # What all quantizers share -----------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        return self.settings.bits

    @property
    def role(self) -> Role:
        return self.settings.role

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return self.settings.scale_shape

    @property
    def scale_init(self) -> ScaleInit:
        return self.settings.scale_init

    @property
    def signed(self) -> bool:
        """Tell whether codes are signed; before calibration, whether the settings ask for it."""
        state = self._state()
        return bool(self.settings.signed) if state == NOT_CALIBRATED else state == SIGNED

    @property
    def qmin(self) -> int:
        """Return the smallest integer code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Return the largest integer code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        # Read how many hooks there are, as Dynamo guards what it reads: compiled code, be it of another model, is then
        # not used again once hooks have come or gone. By itself it looks at them only while it traces.
        _ = len(self._forward_hooks), len(self._forward_pre_hooks)
        if self.observer is not None:
            self.observer.update(x)
            return x
        if not self.initialized:
            raise RuntimeError(
                f"{self.path or type(self).__name__}: this {self.role} quantizer has no range yet. "
                f"{_HOW_TO_GET_A_RANGE[self.role]} A copy or an average (EMA, SWA) that was begun before that has "
                "none either: make it of the calibrated model."
            )
        return self.fake_quantize(x)

    @torch.no_grad()
    def initialize(self, x: Tensor, minimum: float | None = None) -> None:
        """Decide the sign (if it was left open) and the first learnable values from the sample `x`.

        Args:
            x: The weight, or a 1-d sample of activations.
            minimum: Smallest value seen, where `x` is only a part of the data. Defaults to `x.min()`.

        Raises:
            ValueError: If `x` is empty, or has infinite or NaN values. Whatever is raised, values and state are then
                as before.
        """
        if x.numel() == 0 or not torch.isfinite(x).all():
            found = "an empty tensor" if x.numel() == 0 else "infinite or NaN values"
            raise ValueError(f"{self.path or type(self).__name__}: cannot fit a range to {found}; check the inputs.")
        signed = self.settings.signed
        if signed is None and not self.has_offset:  # codes that an offset moves have no sign
            signed = (x.min().item() if minimum is None else minimum) < 0
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        before = [tensor.clone() for tensor in own]
        try:
            self._fill(1.0)  # the state is read while they are fitted, and is not believed beside values of NaN
            self.take_state(bool(signed))
            self.fit(x.to(torch.promote_types(x.dtype, torch.float32)))
        except BaseException:
            for tensor, value in zip(own, before, strict=True):
                tensor.copy_(value)
            raise

    def keep_as_calibrated(self) -> None:
        """Take its values out of training: calibration alone sets them. An input without gradients then needs none."""
        self.learned = False
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the range: `forward` raises until [`initialize`] is called."""
        self._fill(torch.nan)
        self._write_state(NOT_CALIBRATED)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Return the integer codes of `x` in `[qmin, qmax]`, dtype int16: those behind `fake_quantize(x)`."""
        scale, offset = self.grid(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as `fake_quantize` computes
        return ((x - offset) / scale).round().clamp(self.qmin, self.qmax).to(torch.int16)

    def take_over(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:  # noqa: ARG002
        """Make `code * scale + offset` the grid of this quantizer and return a weight that quantizes to `codes` on it.

        Unpacking needs it. It is the inverse of `quantize` and `grid`, as far as there is one.

        Args:
            codes: Integer codes of a weight, of any shape.
            scale: Step size of shape `scale_shape`.
            offset: Value of code 0, of shape `scale_shape`.
        """
        raise ValueError(f"{self.path or type(self).__name__}: a {type(self).__name__} cannot be unpacked.")

    def blank_copy(self) -> Quantizer:
        """Make a quantizer with the settings of this one and none of its values, on torch's default device."""
        new = type(self)(self.settings)
        new.path = self.path
        if not self.learned:
            new.keep_as_calibrated()
        return new

    @torch.no_grad()
    def dequantize(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the grid values of integer `codes`, in the dtype of the scale. `x` is for `grid`, see there."""
        scale, offset = self.grid(x)
        return codes.to(scale.dtype) * scale + offset

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Save as any module does, and note the bits beside torch's version of the module: `torch.save` keeps them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).get(prefix[:-1], {})["bits"] = self.bits

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs):
        """Load as any module does; refuse values that are known to be of other bits: their grid is another one."""
        bits = local_metadata.get("bits", self.bits)
        if bits != self.bits and any(f"{prefix}{name}" in state_dict for name in (*self._parameters, *self._buffers)):
            error_msgs.append(
                f"{prefix[:-1]}: its values are those of {bits} bits, and this model has {self.bits}. Quantize with "
                "the configuration that was saved. To go on with other bits load the weights alone, and calibrate: "
                '`load_state_dict({k: v for k, v in state.items() if "_quantizer." not in k}, strict=False)`.'
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs)

    def _apply(self, fn, recurse=True):
        """Move and convert as any module does, but let `.to(torch.bfloat16)` and the like leave the grid as it is."""
        return super()._apply(without_narrowing(fn), recurse)

    def extra_repr(self) -> str:
        sign = {True: "signed", False: "unsigned"}[self.signed] if self.initialized else "not calibrated"
        offset = ", offset" if self.has_offset else ""
        return f"bits={self.bits}, {sign}{offset}, scale={'tensor' if self.scale_shape == (1,) else 'channel'}"


class Observer(ABC):
    """Sees what would have been quantized while a model runs in float."""

    @abstractmethod
    def update(self, x: Tensor) -> None: ...

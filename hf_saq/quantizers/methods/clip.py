"""Define what LIQ, PACT and DoReFa share: one clipping value, and the grid of activations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..affine import affine_fake_quantize
from ..contract import Quantizer
from ..scale_search import mse_scale
from ..settings import QuantizerSettings
from ..straight_through import SCALE_FLOOR, positive


class ClipQuantizer(Quantizer):
    """Quantizes to a grid whose outermost value is the Parameter `clip_value`; subclasses say what weights get.

    Activations: codes times `clip_value / qmax`, that is `2^b` values on `[0, c]` if unsigned, as in the papers. None
    of them knows negative activations (GELU, LayerNorm), so signed ones take the grid of LSQ, through zero, which
    clips to `[c * qmin / qmax, c]`. `"auto"` takes it where calibration saw a negative value; `"unsigned"` cuts
    negative values to zero because it was told to.

    Weights: signed codes only.
    """

    clip_value: nn.Parameter
    through_rounding: ClassVar[bool] = True
    """Whether the rounding error counts in the gradient of `clip_value`."""
    largest_fraction: ClassVar[float] = 1.0
    """First `clip_value` of activations as a share of the largest magnitude, where `scale_init` is `"mean"`."""

    def __init__(self, settings: QuantizerSettings):
        super().__init__(settings)
        if self.role == "weight" and settings.signed is not True:
            raise ValueError(
                f"{type(self).__name__}: signed={settings.signed!r}; expected True, weights have signed codes."
            )
        self.clip_value = nn.Parameter(torch.full(self.scale_shape, torch.nan, dtype=torch.float32))

    @property
    def has_offset(self) -> bool:
        return self.role == "weight"

    def learned_grid(self, x: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return `grid(x)` with the gradient of `clip_value`."""
        scale = positive(self.clip_value / self.qmax)
        return scale, torch.zeros_like(scale)

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, offset = self.learned_grid(x)
        return scale.detach(), offset.detach()

    def fake_quantize(self, x: Tensor) -> Tensor:
        scale, offset = self.learned_grid(x)
        return affine_fake_quantize(x, scale, offset, self.qmin, self.qmax, through_rounding=self.through_rounding)

    def fit(self, x: Tensor) -> None:
        x = x.to(self.clip_value.dtype)
        clip_value = self.fitted_weight_clip(x) if self.role == "weight" else self.fitted_activation_clip(x)
        self.clip_value.copy_(clip_value.clamp_min(SCALE_FLOOR))

    def fitted_activation_clip(self, x: Tensor) -> Tensor:
        if self.scale_init == "mse":
            return mse_scale(x, self.scale_shape, self.qmin, self.qmax) * self.qmax
        return x.abs().max() * self.largest_fraction

    def fitted_weight_clip(self, x: Tensor) -> Tensor:
        """Find the first `clip_value` for the weight `x`, of shape `scale_shape`."""
        raise NotImplementedError

"""Quantize by LSQ+: Bhalgat et al., arXiv:2004.09576."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..affine import LSQFactor, affine_fake_quantize
from ..scale_search import mse_range
from ..settings import QuantizerSettings
from ..statistics import mean_and_std
from ..straight_through import SCALE_FLOOR, positive
from .lsq import LSQQuantizer


class LSQPlusQuantizer(LSQQuantizer):
    """Adds a learned offset for activations to LSQ: `x_q = s * clip(round((x - o)/s), 0, 2^b - 1) + o`.

    Weights are symmetric and signed, as in LSQ. What activations get follows from `signed`, that is from the
    configuration's `activation_mode`:

    - `None` (`"auto"` and `"affine"`): the affine grid, whatever calibration sees. Codes are unsigned, the offset is
      any real number, so that zero need not be a grid value.
    - `True`, `False` (`"signed"`, `"unsigned"`): LSQ's grid through zero; there is no `offset`.

    The mode is settled at construction, not by data: whether a Parameter exists must not depend on calibration.

    Gradients of step size and offset as in `affine_fake_quantize`, both times LSQ's `1 / sqrt(N * qmax)`. First
    values with `"mean"`: `s = max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1)` for weights, the smallest to the largest
    value for activations. With `"mse"`: the least squared error, which the paper prefers for activations since
    outliers spoil their extremes; found by a search rather than by gradient descent.
    """

    activation_modes = ("auto", "signed", "unsigned", "affine")
    offset: nn.Parameter | None

    def __init__(self, settings: QuantizerSettings):
        super().__init__(settings)
        offset = torch.full(self.scale_shape, torch.nan, dtype=torch.float32)
        self.register_parameter("offset", nn.Parameter(offset) if self.has_offset else None)

    @property
    def has_offset(self) -> bool:
        return self.role == "activation" and self.settings.signed is None

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return super().fake_quantize(x)
        scale, factor = positive(self.scale), LSQFactor(self.role)
        return affine_fake_quantize(x, scale, self.offset, self.qmin, self.qmax, factor)

    def fit(self, x: Tensor) -> None:
        x = x.to(self.scale.dtype)
        if self.offset is not None:
            low, high = mse_range(x, self.qmax + 1) if self.scale_init == "mse" else (x.min(), x.max())
            self.scale.copy_(((high - low) / self.qmax).clamp_min(SCALE_FLOOR))
            self.offset.copy_(low)
        elif self.role == "weight" and self.scale_init == "mean":
            mean, std = mean_and_std(x, self.scale_shape)
            largest = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs())
            self.scale.copy_((largest / 2 ** (self.bits - 1)).clamp_min(SCALE_FLOOR))
        else:
            super().fit(x)

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, offset = super().grid(x)
        return scale, offset if self.offset is None else self.offset.detach()

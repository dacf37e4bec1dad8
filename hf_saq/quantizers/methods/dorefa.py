"""Quantize as DoReFa-Net does: Zhou et al., arXiv:1606.06160."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..settings import QuantizerSettings
from ..statistics import shared_dimensions
from ..straight_through import SCALE_FLOOR, positive, round_straight_through
from .clip import ClipQuantizer

LINEAR_PART = 4.0
"""Weights up to a quarter of the width of the tanh lose at most 2% to it."""


class DoReFaQuantizer(ClipQuantizer):
    """Squashes weights by tanh onto `2^b` levels without zero, and clips activations to a fixed range.

    Weights, with `quantize_k(a) = round(n a) / n`, `n = 2^b - 1`, and `c` the learned `clip_value`:

        u   = tanh(w / t) / max|tanh(w / t)|
        w_q = c * (2 quantize_k(u/2 + 1/2) - 1)

    The affine grid is `scale = 2c/n`, `offset = c/n`. The gradient runs through tanh and the maximum, as through the
    paper's formula. The paper has `c = t = 1`, which a normalization behind the layer makes up for in a network
    trained from scratch. For a float checkpoint to keep its function, `c` starts where `w_q` is closest to `w`
    (`"mse"`), or where small weights keep their value (`"mean"`); and `t`, the buffer `tanh_width`, is 1 unless the
    largest weight exceeds 1/4, then four times that weight: otherwise the large weights of a depthwise convolution
    would all become the same value.

    Activations: the paper's `quantize_k(clip(a, 0, 1))` on `[0, c]` instead of `[0, 1]`. This `c` comes from
    calibration and stays: it is a Parameter with `requires_grad=False`. Signed ones as told in `ClipQuantizer`.
    """

    learns_activation_clip: ClassVar[bool] = False
    tanh_width: Tensor

    def __init__(self, settings: QuantizerSettings):
        super().__init__(settings)
        if self.role == "weight":
            self.register_buffer("tanh_width", torch.ones(self.scale_shape, dtype=torch.float32))
        else:
            self.clip_value.requires_grad_(self.learns_activation_clip)

    def squash(self, w: Tensor) -> Tensor:
        """Compute `u`, in `[-1, 1]`, in float32 at least."""
        squashed = torch.tanh(w / self.tanh_width)
        largest = squashed.abs().amax(dim=shared_dimensions(w, self.scale_shape), keepdim=True)
        return squashed / largest.reshape(self.scale_shape).clamp_min(SCALE_FLOOR)

    def learned_grid(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.role == "activation":
            return super().learned_grid(x)
        scale = positive(self.clip_value / (self.qmax + 0.5))  # 2/n = 1 / (qmax + 1/2)
        return scale, scale / 2

    def _place(self, w: Tensor) -> Tensor:
        """Compute the code of each weight before rounding, in `[qmin, qmax]`."""
        return self.squash(w) * (self.qmax + 0.5) - 0.5  # n (u/2 + 1/2), less 2^(b-1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.role == "activation":
            return super().fake_quantize(x)
        scale, offset = self.learned_grid(x)
        return (round_straight_through(self._place(x)) * scale + offset).to(x.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        if self.role == "activation":
            return super().quantize(x)
        return self._place(x).round().to(torch.int16)

    @torch.no_grad()
    def take_over(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:  # noqa: ARG002 (half the scale)
        """Return the weight whose largest magnitude is that of the grid; set the tanh as `fitted_weight_clip` does."""
        self.clip_value.copy_(scale * (self.qmax + 0.5))
        self.tanh_width.copy_((LINEAR_PART * self.clip_value).clamp_min(1))
        self.take_state(signed=True)
        u = (codes + 0.5) / (self.qmax + 0.5)
        return self.tanh_width * torch.atanh(u * torch.tanh(self.clip_value / self.tanh_width))

    def fitted_weight_clip(self, x: Tensor) -> Tensor:
        shared = shared_dimensions(x, self.scale_shape)
        largest = x.abs().amax(dim=shared, keepdim=True).reshape(self.scale_shape)
        self.tanh_width.copy_((LINEAR_PART * largest).clamp_min(1))
        if self.scale_init == "mean":
            return self.tanh_width * torch.tanh(largest / self.tanh_width)
        levels = (self._place(x).round() + 0.5) / (self.qmax + 0.5)  # w_q = c * levels: least squares in c
        dot, square = (levels * x).sum(dim=shared, keepdim=True), levels.square().sum(dim=shared, keepdim=True)
        return (dot / square).reshape(self.scale_shape)

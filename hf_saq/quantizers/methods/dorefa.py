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

    A weight of zeros (the last layer of a residual branch, LoRA's second factor) gives no hint of its range: there
    `tanh_width` is -1, which says that `c` counts in units of the largest `tanh(w)`, the range that the weight comes
    to have, and `c` starts at 1. Learned from zero at the small learning rate of quantizers, `c` would hold the weight
    back, since its gradient is proportional to `c / max|w|`.

    A weight that lies on the grid of such a quantizer already (trained, then `dequantize`) is kept with `"mse"`, up to
    6 bits. At 7 and 8 bits the tanh, which belongs to the definition, moves a code by one where the largest weight
    exceeds 0.24 and 0.17; `unpack` undoes it.

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
        squashed = torch.tanh(w / self.tanh_width.abs())
        return squashed / self._largest(squashed)

    def _largest(self, squashed: Tensor) -> Tensor:
        """Take the largest magnitude for each entry of `c`, not less than makes a step of `SCALE_FLOOR`."""
        largest = squashed.abs().amax(dim=shared_dimensions(squashed, self.scale_shape), keepdim=True)
        return largest.reshape(self.scale_shape).clamp_min(SCALE_FLOOR * (self.qmax + 0.5))

    def learned_grid(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.role == "activation":
            scale, offset = super().learned_grid(x)
            # Not by `requires_grad` alone: whoever freezes a model and thaws all of it again would make this PACT.
            return (scale, offset) if self.learns_activation_clip else (scale.detach(), offset)
        clip_value: Tensor = self.clip_value
        if x is not None:
            follows = clip_value * self._largest(torch.tanh(x / self.tanh_width.abs()))
            clip_value = torch.where(self.tanh_width > 0, clip_value, follows)
        scale = positive(clip_value / (self.qmax + 0.5))  # 2/n = 1 / (qmax + 1/2)
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
        self._set_tanh_width(largest=scale * (self.qmax + 0.5))
        follows = self.tanh_width < 0
        self.clip_value.copy_(torch.where(follows, 1.0, scale * (self.qmax + 0.5)))
        self.take_state(signed=True)
        u = (codes + 0.5) / (self.qmax + 0.5)
        width, reach = self.tanh_width.abs(), scale * (self.qmax + 0.5)
        return width * torch.atanh(u * torch.tanh(reach / width))

    def _set_tanh_width(self, largest: Tensor) -> None:
        is_zero = largest <= SCALE_FLOOR * (self.qmax + 0.5)
        self.tanh_width.copy_(torch.where(is_zero, -1.0, (LINEAR_PART * largest).clamp_min(1)))

    def fitted_weight_clip(self, x: Tensor) -> Tensor:
        shared = shared_dimensions(x, self.scale_shape)
        largest = x.abs().amax(dim=shared, keepdim=True).reshape(self.scale_shape)
        self._set_tanh_width(largest)
        if self.scale_init == "mean":
            clip_value = self.tanh_width * torch.tanh(largest / self.tanh_width)
        else:
            levels = (self._place(x).round() + 0.5) / (self.qmax + 0.5)  # w_q = c * levels: least squares in c
            dot, square = (levels * x).sum(dim=shared, keepdim=True), levels.square().sum(dim=shared, keepdim=True)
            clip_value = (dot / square).reshape(self.scale_shape)
        return torch.where(self.tanh_width > 0, clip_value, 1.0)

"""Quantize by LIQ, learned clipping of standardised weights: the quantizer of the SAQ authors' CNN code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scale_search import mse_scale
from ..statistics import mean_and_std, shared_dimensions
from ..straight_through import SCALE_FLOOR, positive
from .clip import ClipQuantizer


class LIQQuantizer(ClipQuantizer):
    """Quantizes to even levels on a learned interval `[-c, c]`, in units of the weight's standard deviation.

    Weights, with `n = 2^b - 1` and no gradient through the statistics:

        w_hat = (w - mean) / std
        w_q   = std * c * (2/n * round(n/2 * (clip(w_hat / c, -1, 1) + 1)) - 1) + mean

    These are `2^b` levels without an exact zero (in `w_hat`), and an affine grid: `scale = std * 2c/n`,
    `offset = mean + scale/2`. Mean and standard deviation are those of the tensor, or of each output channel.

    Two departures from the authors' code. It leaves out `std * ... + mean`, which a network can afford that is trained
    from scratch with a normalization behind every convolution. Here both come back, always: without the mean every
    output would shift by `mean * sum(inputs)`, which no normalization undoes, so a float checkpoint would lose its
    function at load; the price is an offset in packed layers. And it standardises the weights of convolutions only.

    A weight that lies on the grid of such a quantizer already (trained, then `dequantize`) keeps its codes with
    `"mse"` where rounding and clipping had moved its mean by less than a tenth of a step. Its values move about as far
    as the mean did: the grid lies around the mean of what it is given.

    Activations: `[0, c]`, signed ones as told in `ClipQuantizer`. First values: `0.8 * max` with `"mean"`, the rule of
    that code, or the least squared error with `"mse"`.
    """

    largest_fraction = 0.8

    def learned_grid(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.role == "activation":
            return super().learned_grid(x)
        if x is None:
            raise ValueError(
                f"{self.path or type(self).__name__}: the grid of LIQ depends on the mean and standard deviation of "
                "the weight; pass it: `grid(weight)`, `dequantize(codes, weight)`."
            )
        mean, std = mean_and_std(x, self.scale_shape)
        scale = positive(std * self.clip_value / (self.qmax + 0.5))  # 2/n = 1 / (qmax + 1/2)
        return scale, mean + scale / 2

    @torch.no_grad()
    def take_over(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the grid values, moved by the rounding error of their mean: the grid follows the weight's mean."""
        values = codes * scale + offset
        mean, _ = mean_and_std(values, self.scale_shape)
        values += offset - scale / 2 - mean
        _, std = mean_and_std(values, self.scale_shape)
        self.clip_value.copy_(scale * (self.qmax + 0.5) / std.clamp_min(SCALE_FLOOR))
        self.take_state(signed=True)
        return values

    def fitted_weight_clip(self, x: Tensor) -> Tensor:
        mean, std = mean_and_std(x, self.scale_shape)
        w_hat = (x - mean) / std.clamp_min(SCALE_FLOOR)
        if self.scale_init == "mse":
            clip_value = mse_scale(w_hat, self.scale_shape, self.qmin, self.qmax, shift=0.5) * (self.qmax + 0.5)
        else:
            largest = w_hat.abs().amax(dim=shared_dimensions(x, self.scale_shape), keepdim=True)
            clip_value = largest.reshape(self.scale_shape) * self.largest_fraction
        # A constant weight gives no hint. Zero would clip everything, and without a gradient, once it varies.
        return torch.where(clip_value > SCALE_FLOOR, clip_value, self._clip_of_normal_weights(x))

    def _clip_of_normal_weights(self, x: Tensor) -> Tensor:
        """Find the clip with the least squared error for normal weights, on 1,000 quantiles: `()`."""
        normal = torch.special.ndtri((torch.arange(1000, device=x.device, dtype=x.dtype) + 0.5) / 1000)
        return mse_scale(normal, (1,), self.qmin, self.qmax, shift=0.5)[0] * (self.qmax + 0.5)

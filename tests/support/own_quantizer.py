"""A quantizer that this package does not know."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_saq.quantizers import Quantizer, QuantizerSettings, mse_scale, round_straight_through


class PowerOfTwo(Quantizer):
    """Steps that are powers of two, found once and never learned: a buffer and no Parameter."""

    scale: Tensor

    def __init__(self, settings: QuantizerSettings):
        super().__init__(settings)
        self.register_buffer("scale", torch.ones(self.scale_shape))

    def fake_quantize(self, x: Tensor) -> Tensor:
        codes = round_straight_through((x / self.scale).clamp(self.qmin, self.qmax))
        return (codes * self.scale).to(x.dtype)

    def fit(self, x: Tensor) -> None:
        step = mse_scale(x, self.scale_shape, self.qmin, self.qmax)
        self.scale.copy_(step.clamp_min(2**-20).log2().round().exp2())

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.scale, torch.zeros_like(self.scale)

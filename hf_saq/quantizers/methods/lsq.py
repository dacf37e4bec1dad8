"""Quantize by Learned Step Size Quantization (LSQ): Esser et al., arXiv:1902.08153."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..affine import LSQFactor, affine_fake_quantize
from ..contract import Quantizer
from ..scale_search import mse_scale
from ..settings import QuantizerSettings
from ..straight_through import SCALE_FLOOR


def lsq_fake_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int, grad_scale: float = 1.0) -> Tensor:
    """Compute `s * clip(round(x/s), qmin, qmax)` (Eq. 1-2, arXiv:1902.08153), differentiable in `x` and `scale`.

    Args:
        x: Any shape.
        scale: Step size `s`, `(1,)` or broadcastable against `x`.
        grad_scale: Factor on the gradient of `scale` (the paper's `g`).

    Returns:
        Same shape and dtype as `x`.
    """
    return affine_fake_quantize(x, scale, None, qmin, qmax, grad_scale)


class LSQQuantizer(Quantizer):
    """Quantizes to a uniform grid through zero, with one learned step size per tensor or channel.

    Gradients: of `x`, one inside the grid and zero outside; of the step size, Eq. 3 of the paper times
    `1 / sqrt(N * qmax)`, where `N` counts the elements that share one step size (of one sample, for activations: the
    mean over the batch is already in the loss).
    """

    scale: nn.Parameter

    def __init__(self, settings: QuantizerSettings):
        super().__init__(settings)
        self.scale = nn.Parameter(torch.full(self.scale_shape, torch.nan, dtype=torch.float32))

    def fake_quantize(self, x: Tensor) -> Tensor:
        return affine_fake_quantize(x, self.scale, None, self.qmin, self.qmax, LSQFactor(self.role))

    def fit(self, x: Tensor) -> None:
        x = x.to(self.scale.dtype)
        if self.scale_init == "mse":
            scale = mse_scale(x, self.scale_shape, self.qmin, self.qmax)
        else:  # Section 2.1 of the paper
            scale = 2 * x.abs().sum_to_size(self.scale_shape) * self.scale.numel() / x.numel() / math.sqrt(self.qmax)
        self.scale.copy_(scale.clamp_min(SCALE_FLOOR))

    @torch.no_grad()
    def take_over(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        self.scale.copy_(scale)
        self.take_state(signed=True)
        return codes * scale + offset

    def grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        scale = self.scale.detach().clamp_min(SCALE_FLOOR)
        return scale, torch.zeros_like(scale)

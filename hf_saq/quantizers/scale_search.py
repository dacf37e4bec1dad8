"""The step size with the smallest squared quantization error, by a search over clipping points."""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 100


def mse_scale(x: Tensor, scale_shape: tuple[int, ...], qmin: int, qmax: int) -> Tensor:
    """Minimise `mean((x - s * clip(round(x/s), qmin, qmax))^2)` over `s = max|x| * k/100 / qmax`, `k = 1..100`.

    Args:
        x: Values to fit, at least one.
        scale_shape: `(1,)` or a shape that broadcasts against `x`, such as `(out, 1)`: one search per channel.

    Returns:
        Step sizes of shape `scale_shape`; zero where all values of a channel are zero.
    """
    shared = [d for d in range(x.ndim) if len(scale_shape) != x.ndim or scale_shape[d] == 1]
    largest = x.abs().amax(dim=shared, keepdim=True) if shared else x.abs()
    best = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest)
    for k in range(1, CANDIDATES + 1):
        candidate = (largest * (k / CANDIDATES) / qmax).clamp_min(torch.finfo(x.dtype).tiny)
        error = (x / candidate).round_().clamp_(qmin, qmax).mul_(candidate).sub_(x).square_()
        error = error.mean(dim=shared, keepdim=True) if shared else error
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
    return scale.reshape(scale_shape)

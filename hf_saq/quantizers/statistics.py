"""Compute sums, means and deviations over the elements that share one entry of a scale."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_dimensions(x: Tensor, scale_shape: tuple[int, ...]) -> list[int]:
    """List the dimensions of `x` along which the elements share one entry of a scale of shape `scale_shape`."""
    return [d for d in range(x.ndim) if len(scale_shape) != x.ndim or scale_shape[d] == 1]


def mean_and_std(x: Tensor, scale_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Take mean and (unbiased) deviation of the elements that share one scale, detached, each `scale_shape`."""
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

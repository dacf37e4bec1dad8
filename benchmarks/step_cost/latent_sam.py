"""Sharpness-aware minimization as it is usually written: latent weights are moved in place, between two passes.

What https://github.com/davda54/sam does in `first_step` and `second_step`, without its wrapper of the optimizer. On a
quantized model this is case 2, with every parameter perturbed and one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def latent_sam_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rho: float, backward: Callable[[], Tensor]
) -> Tensor:
    """One optimizer step; leaves no gradients. Returns the loss of the first pass."""
    loss = backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        norm = torch.stack([p.grad.norm(p=2) for p in parameters if p.grad is not None]).norm(p=2)
        scale = rho / (norm + 1e-12)
        old = [p.clone() for p in parameters]
        for p in parameters:
            assert p.grad is not None
            p.add_(p.grad * scale)
    optimizer.zero_grad()
    backward()
    with torch.no_grad():
        for p, before in zip(parameters, old, strict=True):
            p.copy_(before)
    optimizer.step()
    optimizer.zero_grad()
    return loss

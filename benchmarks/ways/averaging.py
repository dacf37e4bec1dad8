"""Average the latent weights over training and use the average, quantized, in place of the last weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LatentAverage:
    """Keeps an exponential moving average of all parameters, scales among them, renewed after each optimizer step.

    In the first steps the decay is `(1 + t) / (10 + t)` where that is smaller, so that the average does not remember
    where training began.

    Args:
        decay: Share of the average that a step keeps; 0 gives the last weights.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float):
        self._parameters = list(model.parameters())
        self._average = [p.detach().clone() for p in self._parameters]
        self._decay, self._steps = decay, 0
        optimizer.register_step_post_hook(self._renew)

    @torch.no_grad()
    def _renew(self, *_: Any) -> None:
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def conclude(self) -> None:
        """Put the average into the model."""
        torch._foreach_copy_([p.detach() for p in self._parameters], self._average)

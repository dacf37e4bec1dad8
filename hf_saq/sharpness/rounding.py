"""Notice where low precision rounds the perturbation away.

A quantized weight takes few values, and `eps` is small compared with them. Rounded to bfloat16, which keeps 8 bits,
`w_q + eps` is `w_q` again for most weights unless the radius is large. That alone is no loss: the few weights that
lie close to an edge move by a whole step of bfloat16, many times their `eps`. What counts is how far the weights move
along `eps`: to first order, the rise of the loss. Where no weight lies close to an edge, training is plain
quantization-aware training at twice the cost, and nothing else would show it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

ENOUGH = 0.5
"""Share of the way along `eps` that must be left after rounding, from 0 to 1."""


class RoundingCheck:
    """Measures, in the first perturbed pass, what rounding to the type of the products leaves of the way of `eps`."""

    def __init__(self) -> None:
        self._is_done = False
        self._ways: list[Tensor] = []
        self._dtype: torch.dtype | None = None

    @torch.no_grad()
    def look(self, w_q: Tensor, eps: Tensor) -> None:
        """Add in the elements of one weight; `eps`, of the same shape, is about to be added to it."""
        if self._is_done or torch.compiler.is_compiling():
            return
        dtype, device = w_q.dtype, w_q.device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype.itemsize < 4:
            self._dtype = dtype
            moved = (w_q + eps.to(w_q.dtype)).to(dtype).float() - w_q.to(dtype).float()
            eps = eps.float()
            self._ways.append(torch.stack([(moved * eps).sum(), eps.square().sum()]))

    def conclude(self, rho: float) -> None:
        """Warn, once in the life of a minimizer, if too little is left."""
        if self._is_done or not self._ways:
            return
        left, all_of_it = torch.stack([sums.cpu() for sums in self._ways]).double().sum(dim=0).tolist()
        self._is_done, self._ways = True, []
        if left < ENOUGH * all_of_it:
            warnings.warn(
                f"rho={rho}: rounding to {str(self._dtype).removeprefix('torch.')} leaves {left / all_of_it:.0%} of "
                "the way that the perturbation moves the quantized weights, so that it has little effect. Train in "
                "float32 (no bf16, no autocast), or with a larger rho.",
                stacklevel=2,
            )

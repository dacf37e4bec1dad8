"""Notice where low precision rounds the perturbation away.

A quantized weight takes few values, and `eps` is small compared with them. Rounded to bfloat16, which keeps 8 bits,
`w_q + eps` is `w_q` again for most weights unless the radius is large. Training then is plain quantization-aware
training at twice the cost, and nothing else would show it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

ENOUGH = 0.5
"""Share of weights that must still move after rounding, from 0 to 1."""


class RoundingCheck:
    """Counts, in the first perturbed pass, the weights that still move after rounding to the type of the products."""

    def __init__(self) -> None:
        self._is_done = False
        self._moved: list[Tensor] = []
        self._dtype: torch.dtype | None = None

    @torch.no_grad()
    def look(self, w_q: Tensor, eps: Tensor) -> None:
        """Count in the elements of one weight; `eps`, of the same shape, is about to be added to it."""
        if self._is_done or torch.compiler.is_compiling():
            return
        dtype, device = w_q.dtype, w_q.device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype.itemsize < 4:
            self._dtype = dtype
            moved = (w_q + eps.to(w_q.dtype)).to(dtype) != w_q.to(dtype)
            self._moved.append(torch.stack([moved.sum(), (eps != 0).sum()]))

    def conclude(self, rho: float) -> None:
        """Warn, once in the life of a minimizer, if too few weights moved."""
        if self._is_done or not self._moved:
            return
        moved, all_of_them = torch.stack([counts.cpu() for counts in self._moved]).sum(dim=0).tolist()
        self._is_done, self._moved = True, []
        if moved < ENOUGH * all_of_them:
            warnings.warn(
                f"rho={rho}: rounding to {str(self._dtype).removeprefix('torch.')} leaves "
                f"{1 - moved / all_of_them:.0%} of the quantized weights where they were, so that the perturbation "
                "has little effect. Train in float32 (no bf16, no autocast), or with a larger rho.",
                stacklevel=2,
            )

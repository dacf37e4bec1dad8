"""Count weights that oscillate between codes while a model trains (Nagel et al., arXiv:2203.11086)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import QuantizedLayer
from ..sharpness.sharding import is_sharded


@dataclass(eq=False)
class _Codes:
    """Holds, for each weight of one layer: its code, the sign of its last change (0: none yet), its frequency."""

    code: Tensor
    sign: Tensor
    frequency: Tensor


class OscillationCounter:
    """Follows the integer codes of all quantized weights from step to step.

    A weight oscillates at a step if its code changes in the direction opposite to its last change. The frequency is a
    running mean, `f <- m * o + (1 - m) * f`, with `o` one at such a step and zero at others (as in the paper).

    It takes seven bytes for each quantized weight, and each [`update`] one pass over the weights.

    Args:
        model: A model with quantized weights.
        momentum: `m`, in (0, 1].
        threshold: Frequency above which a weight counts as oscillating, in [0, 1).

    Raises:
        ValueError: If an argument is out of range, or the model has no quantized weight or is sharded.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.01, threshold: float = 0.005):
        if not 0 < momentum <= 1 or not 0 <= threshold < 1:
            raise ValueError(
                f"OscillationCounter: momentum={momentum}, threshold={threshold}; expected (0, 1] and [0, 1)."
            )
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]
        self.layers = {name: m for name, m in layers if m.weight_quantizer is not None}
        if not self.layers:
            raise ValueError(
                f"OscillationCounter: {type(model).__name__} has no quantized weight; expected a model made by "
                "`quantize` with weight_bits, not packed."
            )
        if any(is_sharded(layer.weight) for layer in self.layers.values()):
            raise ValueError("OscillationCounter: the weights are sharded (FSDP2); expected whole ones, as under DDP.")
        self.momentum, self.threshold = momentum, threshold
        self.updates = 0
        self._codes: dict[str, _Codes] = {}
        self._changed: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            code = self._code(layer)
            none = torch.zeros_like(code, dtype=torch.int8)
            self._codes[name] = _Codes(code, none, torch.zeros_like(code, dtype=torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """Look at the codes after an optimizer step."""
        self.updates += 1
        for name, layer in self.layers.items():
            seen = self._codes[name]
            code = self._code(layer)
            sign = (code - seen.code).sign().to(torch.int8)
            turned = (sign * seen.sign) < 0
            seen.frequency.mul_(1 - self.momentum).add_(turned, alpha=self.momentum)
            self._changed[name] = (sign != 0).sum()
            seen.code, seen.sign = code, torch.where(sign != 0, sign, seen.sign)

    def oscillating(self) -> dict[str, float]:
        """Return the share of oscillating weights in each layer."""
        return {name: (c.frequency > self.threshold).cpu().double().mean().item() for name, c in self._codes.items()}

    def summary(self) -> dict[str, float]:
        """Return shares of all quantized weights, for a log.

        `oscillating_weights` have a frequency above the threshold; `changed_codes` changed in the last step. Nothing
        before the first update.
        """
        if not self.updates:
            return {}
        total = sum(c.code.numel() for c in self._codes.values())
        oscillating = torch.stack([(c.frequency > self.threshold).sum() for c in self._codes.values()]).sum()
        changed = torch.stack(list(self._changed.values())).sum()
        return {"oscillating_weights": oscillating.item() / total, "changed_codes": changed.item() / total}

    @staticmethod
    def _code(layer: QuantizedLayer) -> Tensor:
        assert layer.weight_quantizer is not None
        return layer.weight_quantizer.quantize(layer.weight)

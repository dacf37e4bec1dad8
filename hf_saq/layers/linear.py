"""Linear layer with quantized weight and input."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` on quantized operands. Input `(..., in_features)`, weight `(out_features, in_features)`."""

    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)

"""Run linear layers with quantized weight and input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantized import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """Runs `nn.Linear` on quantized operands. Input `(..., in_features)`, weight `(out_features, in_features)`."""

    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantTransposedLinear(QuantizedLayer):
    """Runs transformers' `Conv1D`, GPT-2's linear layer, on quantized operands. Weight `(nx, nf)`: inputs first."""

    channel_axis = 1

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        return {"nf": layer.nf, "nx": layer.nx}

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.mT, bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"

"""Layers on quantized operands, and which float layer each one stands in for."""

from torch import nn

from .base import QuantizedLayer
from .conv import QuantConv1d, QuantConv2d
from .linear import QuantLinear
from .packed import PackedLayer

QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}
"""Only these exact types are replaced: a subclass may compute something else."""

__all__ = ["QUANTIZED_LAYERS", "PackedLayer", "QuantConv1d", "QuantConv2d", "QuantLinear", "QuantizedLayer"]

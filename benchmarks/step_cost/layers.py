"""Single layers to time, and the same layers quantized by other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .plain_steps import BITS

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 384-1536, 8x197 tokens": (lambda: nn.Linear(384, 1536), (8, 197, 384)),
    "linear 1536-384, 8x197 tokens": (lambda: nn.Linear(1536, 384), (8, 197, 1536)),
    "conv 64-64 3x3, 8x56x56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (8, 64, 56, 56)),
    "conv 256-256 3x3, 8x14x14": (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (8, 256, 14, 14)),
}


class UnfusedLSQ(nn.Module):
    """LSQ in ordinary autograd operations, what a few lines of PyTorch would be."""

    def __init__(self, layer: Any, ours: Any):
        super().__init__()
        self.layer: Any = copy.deepcopy(layer)
        self.weight_scale = nn.Parameter(ours[0].weight_quantizer.scale.detach().clone())
        self.input_scale = nn.Parameter(ours[0].activation_quantizer.scale.detach().clone())

    @staticmethod
    def quantize(x: Tensor, scale: Tensor) -> Tensor:
        v = (x / scale).clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        return (v + (v.round() - v).detach()) * scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantize(self.layer.weight, self.weight_scale)
        return torch.func.functional_call(self.layer, {"weight": weight}, self.quantize(x, self.input_scale))


def torchao_layer(layer: nn.Module) -> nn.Module | None:
    """Of the same bits, but in the granularity that torchao has: inputs per token, weights per channel, none learned.

    It has linear layers alone.
    """
    if not isinstance(layer, nn.Linear):
        return None
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{BITS}"), "per_channel", is_symmetric=True)
    inputs = IntxFakeQuantizeConfig(getattr(torch, f"int{BITS}"), "per_token", is_symmetric=False)
    return FakeQuantizedLinear.from_linear(copy.deepcopy(layer), inputs, weights)


def brevitas_layer(layer: nn.Module) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    how = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": BITS,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": BITS,
        "bias": layer.bias is not None,
    }
    if isinstance(layer, nn.Linear):
        return qnn.QuantLinear(layer.in_features, layer.out_features, **how)
    return qnn.QuantConv2d(layer.in_channels, layer.out_channels, 3, padding=1, **how)


def forward_backward(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        model.zero_grad()
        output = model(x)
        (output if isinstance(output, Tensor) else output.value).backward(grad)

    return step

"""Define the two operators of an integer graph for torch, and how each one is written in ONNX.

`torch.export` keeps an operator of `torch.library` whole, so that scales and zero points reach the graph as they are;
torch's own fake quantization would be exported for 8 bits only, and with float weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .extras import needed

OPSET = 21
"""The first version of ONNX with 4-bit integers; ONNX Runtime has no later `QuantizeLinear`."""


@torch.library.custom_op("hf_saq::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, high: int) -> Tensor:
    """Compute `(clip(round(x / scale) + zero_point, 0, high) - zero_point) * scale`, rounding half to even.

    Args:
        x: Float32, any shape.
        scale: Float32, `()`.
        zero_point: uint8, `()`.
        high: Largest code, up to 255.
    """
    shift = zero_point.to(x.dtype)
    return ((x / scale).round().add(shift).clamp(0, high) - shift) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, high: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.custom_op("hf_saq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Compute `codes * scale`.

    Args:
        codes: int8, any shape.
        scale: Float32, `()` or `(codes.shape[axis],)`.
    """
    return codes * scale.reshape([-1 if i == axis and scale.ndim else 1 for i in range(codes.ndim)])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=scale.dtype)


def translation_table() -> dict[Callable, Callable]:
    """Make the `custom_translation_table` of `torch.onnx.export`: operator -> function that writes its nodes."""
    ir: Any = needed("onnxscript").ir
    op: Any = needed("onnxscript").opset21

    def write_quantize_dequantize(x: Any, scale: Any, zero_point: Any, high: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero_point)
        if high < 255:  # uint8 is wider than the grid; what it clips at its own ends is clipped already
            low, top = (op.Constant(value=ir.tensor(bound, ir.DataType.UINT8)) for bound in (0, high))
            codes = op.Clip(codes, low, top)
        return op.DequantizeLinear(codes, scale, zero_point)

    def write_dequantize(codes: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=axis)

    return {
        torch.ops.hf_saq.quantize_dequantize.default: write_quantize_dequantize,
        torch.ops.hf_saq.dequantize.default: write_dequantize,
    }

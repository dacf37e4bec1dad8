"""Convolutions with quantized weight and input: groups, dilation and padding modes as in the float layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import QuantizedLayer


class _QuantConv(QuantizedLayer):
    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        return {
            name: getattr(layer, name)
            for name in (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "dilation",
                "groups",
                "padding_mode",
            )
        } | {"bias": layer.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        # `_conv_forward` is torch's own seam for a convolution with another weight; it handles the padding modes.
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)  # type: ignore[operator]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`nn.Conv1d` on quantized operands. Weight `(out_channels, in_channels / groups, width)`."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`nn.Conv2d` on quantized operands. Weight `(out_channels, in_channels / groups, height, width)`."""

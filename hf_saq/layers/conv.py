"""Convolve with quantized weight and input: groups, dilation and padding modes are as in the float layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .quantized import QuantizedLayer


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

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # `_conv_forward` is torch's own seam for a convolution with another weight; it handles the padding modes.
        return self._conv_forward(x, weight, bias)  # type: ignore[operator]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """Runs `nn.Conv1d` on quantized operands. Weight `(out_channels, in_channels / groups, width)`."""

    output_channel_axis = -2


class QuantConv2d(_QuantConv, nn.Conv2d):
    """Runs `nn.Conv2d` on quantized operands. Weight `(out_channels, in_channels / groups, height, width)`."""

    output_channel_axis = -3


class QuantConv2dSame(QuantConv2d):
    """Runs timm's `Conv2dSame` on quantized operands: TensorFlow's "same" padding depends on the input's size."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        edges: list[int] = []  # of the last dimension first, as `pad` takes them
        for size, kernel, stride, dilation in zip(
            x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            edges = [total // 2, total - total // 2, *edges]
        return super().compute(F.pad(x, edges), weight, bias)

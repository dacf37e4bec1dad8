"""Write the grids of quantizers as an integer graph holds them: codes in bytes, one scale, one zero point.

A grid of hf_saq is `value = code * scale + offset`. `DequantizeLinear` of ONNX has `(code - zero_point) * scale`,
with an integer zero point, one scale per tensor or per index of one dimension. What does not fit into that becomes
terms that layers add (`integer_layers`), so that no value changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import PackedLayer, QuantizedLayer
from ..quantizers import Quantizer

CODE_RANGE = {"int8": (-128, 127), "int4": (-8, 7)}
"""Smallest and largest code of a stored weight by its type."""


@dataclass(frozen=True)
class ActivationGrid:
    """Describes activations as uint8 codes: `value = (code - zero_point) * scale + offset`, `0 <= code <= high`.

    Attributes:
        scale: float32, `()`.
        zero_point: 0 for unsigned and affine grids, `2^(b-1)` for signed ones.
        high: Largest code, `2^b - 1`.
        offset: float32, `()`; `None` for a grid through zero, as affine ones are behind a ReLU.
    """

    scale: Tensor
    zero_point: int
    high: int
    offset: Tensor | None

    @classmethod
    def of(cls, quantizer: Quantizer) -> ActivationGrid:
        """Take the grid of a calibrated activation quantizer.

        Raises:
            ValueError: If it has more than one scale.
        """
        scale, offset = quantizer.grid()
        if scale.numel() != 1:
            raise ValueError(
                f"{quantizer.path}: {scale.numel()} scales for activations; an integer graph holds one per tensor. "
                "Quantize this layer with an activation quantizer of scale_shape=(1,), or leave its input in float."
            )
        return cls(
            scale=scale.reshape(()).float().cpu(),
            zero_point=-quantizer.qmin,
            high=quantizer.qmax - quantizer.qmin,
            # Leave out an offset of zero, whose subtraction torch's exporter drops where the checks look for it.
            offset=offset.reshape(()).float().cpu() if quantizer.has_offset and offset.any() else None,
        )


@dataclass(frozen=True)
class WeightGrid:
    """Describes a weight as int8 codes: `value = code * scale + offset`.

    Attributes:
        codes: int8, in the shape of the weight.
        scale: float32, `()` or, with one scale per output channel, `(channels,)`.
        axis: Dimension of `codes` that `scale` belongs to.
        offset: float32, in the shape of `scale`; `None` where it is zero.
        bits: Bits of the quantizer.
    """

    codes: Tensor
    scale: Tensor
    axis: int
    offset: Tensor | None
    bits: int

    @classmethod
    def of(cls, layer: QuantizedLayer | PackedLayer, path: str, weights: str) -> WeightGrid | None:
        """Take codes and grid of the weight of `layer`; `None` if it stays in float.

        Grids on half steps (`offset` is half a `scale`: DoReFa, PACT) become grids through zero with the odd codes
        `2c + 1` and half the scale, which changes no value, where the type of `weights` holds those.

        Args:
            path: Name of the layer, for errors.
            weights: Key of `CODE_RANGE`.

        Raises:
            ValueError: If its scales belong to neither the whole tensor nor one dimension, or it has NaN.
        """
        if isinstance(layer, PackedLayer):
            codes, scale, offset, bits = layer.codes(), layer.weight_scale, layer.weight_offset, layer.bits
        elif layer.weight_quantizer is None:
            return None
        else:
            quantizer = layer.weight_quantizer
            codes, bits = layer.codes(), quantizer.bits
            scale, offset = quantizer.grid(layer.weight)
            offset = offset if quantizer.has_offset else None
        axis = _axis_of(scale, codes, path)
        scale = scale.float().cpu().reshape(() if scale.numel() == 1 else (-1,))
        codes = codes.cpu()
        if offset is not None:
            offset = offset.float().cpu().reshape(scale.shape)
            low, high = CODE_RANGE["int4" if weights == "int4" and bits <= 4 else "int8"]
            if torch.equal(offset, scale / 2) and 2 * codes.min() + 1 >= low and 2 * codes.max() + 1 <= high:
                codes, scale, offset = 2 * codes + 1, scale / 2, None
        return cls(codes.to(torch.int8), scale, axis, offset, bits)

    def fits(self, kind: str) -> bool:
        """Tell whether all codes are in the range of `kind`, a key of `CODE_RANGE`."""
        low, high = CODE_RANGE[kind]
        return self.codes.numel() == 0 or bool(self.codes.min() >= low and self.codes.max() <= high)

    def values(self) -> Tensor:
        """Compute the weight in float64."""
        along = [-1 if i == self.axis and self.scale.ndim else 1 for i in range(self.codes.ndim)]
        values = self.codes.double() * self.scale.double().reshape(along)
        return values if self.offset is None else values + self.offset.double().reshape(along)


def _axis_of(scale: Tensor, codes: Tensor, path: str) -> int:
    """Find the dimension that the scales of a weight belong to; 0 if there is one scale."""
    dimensions = [i for i, size in enumerate(scale.shape) if size != 1]
    fits = scale.ndim == codes.ndim and len(dimensions) == 1 and scale.numel() == codes.shape[dimensions[0]]
    if dimensions and not fits:
        raise ValueError(
            f"{path}: weight scales of shape {tuple(scale.shape)} for a weight of shape {tuple(codes.shape)}; an "
            "integer graph holds one scale per tensor or per output channel. Choose weight_granularity='tensor' or "
            "'channel' for this layer, or leave it in float (modules_to_not_convert)."
        )
    return dimensions[0] if dimensions else 0

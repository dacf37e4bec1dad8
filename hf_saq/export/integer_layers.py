"""Compute quantized layers from integer codes, as modules that export to integer graphs.

With `x = x_g + o` (codes times a scale, plus the offset of an affine grid) and `W = W_g + m` alike, a layer computes

    layer(x, W) = layer(x_g, W_g) + m * layer(x_g, 1) + layer(o, W)

The first term is the one for integers. The second sums up inputs, with one filter for each group. The third does not
depend on the input: it belongs to the bias, save where zeros are padded, which have no offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import PackedLayer, QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, QuantTransposedLinear
from ..layers.float_form import take_over_hooks
from ..layers.shared_input import SharedInput
from ..quantizers import Quantizer
from .operators import dequantize, quantize_dequantize
from .stored_grids import ActivationGrid, WeightGrid


class IntegerActivation(nn.Module):
    """Stands in for an activation quantizer."""

    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        grid = ActivationGrid.of(quantizer)
        self.high = grid.high
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", torch.tensor(grid.zero_point, dtype=torch.uint8))
        self.register_buffer("offset", grid.offset)

    def without_offset(self, x: Tensor) -> Tensor:
        """Compute the grid value of each element less the offset of the grid."""
        x = x if self.offset is None else x - self.offset
        return quantize_dequantize(x, self.scale, self.zero_point, self.high)

    def forward(self, x: Tensor) -> Tensor:
        x_g = self.without_offset(x)
        return x_g if self.offset is None else x_g + self.offset


class IntegerLayer(nn.Module):
    """Stands in for a quantized or packed layer; its results differ from those by the order of sums only.

    Buffers: `codes`, int8 in the shape of the weight; `scale`, float32 `()` or `(channels,)`; and what the terms in
    the docstring of this file need.
    """

    codes: Tensor
    scale: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None
    constant_bias: Tensor | None
    border_weight: Tensor | None
    weight_offset: Tensor | None
    ones: Tensor
    _functional: Any
    _one_channel: Any
    _summing: Any

    shared_input: SharedInput | None = None

    def __init__(self, layer: QuantizedLayer | PackedLayer, path: str, weights: str):
        super().__init__()
        functional = layer._functional if isinstance(layer, PackedLayer) else layer
        kind = type(functional)
        with torch.device("meta"):
            own = kind(**kind.constructor_arguments(functional))
        object.__setattr__(self, "_functional", own)  # hyperparameters and `compute` alone
        for name, value in kind.constructor_arguments(functional).items():
            if name != "bias":
                setattr(self, name, value)  # models read `stride`, `in_features` and the like of their layers
        self.bias = layer.bias
        quantizer = layer.activation_quantizer
        self.activation = None if quantizer is None else IntegerActivation(quantizer)
        grid = WeightGrid.of(layer, path, weights)
        if grid is None:
            self.weight = layer.weight
        else:
            # Models ask `layer.weight` for its type and device.
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            self.register_buffer("codes", grid.codes)
            self.register_buffer("scale", grid.scale)
        self.grid = grid
        self._add_term_of_weight_offset()
        self._add_term_of_input_offset()
        take_over_hooks(self, layer)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        add_offset_before = False
        if self.activation is not None:
            add_offset_before = self.activation.offset is not None and not self._offset_is_a_term
            quantize = self.activation if add_offset_before else self.activation.without_offset
            x = quantize(x) if self.shared_input is None else self.shared_input.once(self, x, quantize)
        weight = self.weight if self.grid is None else dequantize(self.codes, self.scale, self.grid.axis)
        bias = self.bias if self.constant_bias is None else self.constant_bias
        y = self._functional.compute(x, weight, bias)
        if self.border_weight is not None:
            mask = x.new_ones((1, 1, *x.shape[2:]))
            y = y + self._one_channel.compute(mask, self.border_weight, None)
        if self.weight_offset is not None:
            y = y + self._sum_of_inputs(x) * self.weight_offset
        return y

    def share_input(self, shared: SharedInput, activation: IntegerActivation | None) -> None:
        """Quantize the input once with the other readers of the tensor, with the `activation` of the first of them."""
        self.shared_input = shared
        if activation is not None:
            del self._modules["activation"]
            vars(self)["activation"] = activation  # not as a child: its values would be in the graph twice

    # The term of the weight's offset --------------------------------------------------------------------------------

    def _add_term_of_weight_offset(self) -> None:
        offset = None if self.grid is None else self.grid.offset
        functional = self._functional
        if offset is not None and _is_convolution(functional):
            offset = offset.reshape(-1, *[1] * len(functional.kernel_size))
            ones = torch.ones(functional.groups, functional.in_channels // functional.groups, *functional.kernel_size)
            self.register_buffer("ones", ones)
            object.__setattr__(self, "_summing", _like(functional, out_channels=functional.groups))
        elif offset is not None and _is_linear(functional):
            inputs = functional.weight.shape[1 - functional.channel_axis]
            self.register_buffer("ones", torch.ones(inputs, 1))
        elif offset is not None:
            raise ValueError(
                f"{type(functional).__name__}: the weights of this quantizer have an offset, and how it acts in a "
                "layer of this type is not known. Choose the quantizer 'lsq' or 'lsq_plus' for it."
            )
        self.register_buffer("weight_offset", offset)

    def _sum_of_inputs(self, x: Tensor) -> Tensor:
        """Sum up what each output sees of `x`: shape of the output, or with a dimension of 1 for its channels."""
        functional = self._functional
        if _is_linear(functional):
            # Not `x.sum`, which OpenVINO computes wrongly where `x` is dequantized.
            return torch.matmul(x, self.ones)
        sums = self._summing.compute(x, self.ones, None)
        per_group = functional.out_channels // functional.groups
        if functional.groups > 1 and per_group > 1:
            sums = sums.repeat_interleave(per_group, dim=functional.output_channel_axis)
        return sums

    # The term of the input's offset ---------------------------------------------------------------------------------

    def _add_term_of_input_offset(self) -> None:
        functional, offset = self._functional, None if self.activation is None else self.activation.offset
        self._offset_is_a_term = _is_convolution(functional) or _is_linear(functional)
        constant_bias = border_weight = None
        if offset is not None and self._offset_is_a_term:
            weight = self.weight.detach().double().cpu() if self.grid is None else self.grid.values()
            term = weight * offset.double()
            if _may_pad_with_zeros(functional):
                border_weight = term.sum(1, keepdim=True).float()
                object.__setattr__(self, "_one_channel", _like(functional, in_channels=1, groups=1))
            else:
                term = term.movedim(functional.channel_axis, 0).flatten(1).sum(1)
                constant_bias = (term if self.bias is None else term + self.bias.detach().double().cpu()).float()
        self.register_buffer("constant_bias", constant_bias)
        self.register_buffer("border_weight", border_weight)


def _is_convolution(layer: Any) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd)


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, (QuantLinear, QuantTransposedLinear))


def _may_pad_with_zeros(layer: Any) -> bool:
    if type(layer) not in (QuantConv1d, QuantConv2d):
        return _is_convolution(layer)  # "same" padding depends on the size of the input
    return layer.padding_mode == "zeros" and layer.padding not in ("valid", (0,), (0, 0))


def _like(layer: Any, **changes: Any) -> Any:
    """Make a convolution, on the meta device, with some arguments of `layer` changed."""
    with torch.device("meta"):
        return type(layer)(**{**layer.constructor_arguments(layer), "bias": False, **changes})

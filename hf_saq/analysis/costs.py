"""Count what a model costs to run and to store, next to float32: bit operations, weight bytes and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..conversion import float_parameters
from ..conversion.observing import run_in_float
from ..layers import PackedLayer, QuantAttentionProducts, QuantizedLayer
from ..layers.packing import packed_size
from ..quantizers import Quantizer
from ..tables import text_table
from .results import Result

FLOAT_BITS = 32
"""Bits of everything that is not quantized, in the model itself and in the float model it is compared with."""


def bit_operations(macs: int, weight_bits: int | None = None, activation_bits: int | None = None) -> int:
    """Compute multiply-accumulates x bits of one operand x bits of the other; `None` stands for float."""
    return macs * (weight_bits or FLOAT_BITS) * (activation_bits or FLOAT_BITS)


@dataclass(frozen=True)
class LayerCost:
    """Holds the cost of one quantized layer: its name, multiply-accumulates, and bits of its two operands.

    The products of one attention count as one such layer if they are quantized. None of their operands is a weight, so
    `weight_bits` holds the bits of the activation that takes its place.
    """

    name: str
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        """Return the bit operations: multiply-accumulates x weight bits x activation bits."""
        return bit_operations(self.macs, self.weight_bits, self.activation_bits)


@dataclass(frozen=True)
class Cost(Result):
    """Holds what [`cost`] counts; `print` shows a table.

    Attributes:
        layers: Quantized layers, in the order of `named_modules`.
        other_macs: Multiply-accumulates in everything else: attention products unless `quantize_attention` is set,
            layers left in float. Each counts `32 x 32` bit operations.
        parameters: Number of parameters of the float model; the values of quantizers are not among them.
        quantized_parameters: How many of them have fewer than 32 bits.
        weight_bytes: Bytes of all parameters as a packed checkpoint of a float32 model stores them, and of the values
            of quantizers; what stays in float counts four bytes whatever its type, as in the float model beside it.
    """

    layers: tuple[LayerCost, ...]
    other_macs: int
    parameters: int
    quantized_parameters: int
    weight_bytes: int

    @property
    def macs(self) -> int:
        """Return all multiply-accumulates, those of `other_macs` among them."""
        return sum(layer.macs for layer in self.layers) + self.other_macs

    @property
    def bops(self) -> int:
        """Return all bit operations, those of `other_macs` among them."""
        return sum(layer.bops for layer in self.layers) + bit_operations(self.other_macs)

    @property
    def float_bops(self) -> int:
        """Return the bit operations of the same model in float32."""
        return bit_operations(self.macs)

    @property
    def float_weight_bytes(self) -> int:
        """Return the bytes of all parameters in float32: four for each."""
        return self.parameters * FLOAT_BITS // 8

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, and the sums: `macs`, `bops`, `float_bops` and `float_weight_bytes`."""
        sums = ("macs", "bops", "float_bops", "float_weight_bytes")
        return {**super().to_dict(), **{name: getattr(self, name) for name in sums}}

    def __str__(self) -> str:
        in_layers = self.macs - self.other_macs
        rows = [
            ("", "float32", "quantized", ""),
            ("bit operations", _short(self.float_bops), _short(self.bops), _ratio(self.float_bops, self.bops)),
            (
                "weight bytes",
                _short(self.float_weight_bytes),
                _short(self.weight_bytes),
                _ratio(self.float_weight_bytes, self.weight_bytes),
            ),
            ("multiply-accumulates", _short(self.macs), _short(in_layers), _share(in_layers, self.macs)),
            (
                "parameters",
                _short(self.parameters),
                _short(self.quantized_parameters),
                _share(self.quantized_parameters, self.parameters),
            ),
        ]
        return text_table(rows, right=(1, 2))


def cost(model: nn.Module, inputs: Any) -> Cost:
    """Count what `model` computes for `inputs` in one forward pass in evaluation mode, and what it takes to store.

    torch's own counter counts matrix products, convolutions and attention products, wherever they happen; elementwise
    operations are not counted. The model may be quantized, calibrated or not, packed, or float.

    Args:
        model: Any model; it is left as it was.
        inputs: One batch as `calibrate` takes them. Pass a single image to get numbers per image.

    Returns:
        Multiply-accumulates, bit operations and bytes. A multiply-accumulate counts as one operation, not as two.

    Raises:
        ValueError: If `inputs` is no tensor, tuple or dict, or names or counts inputs that the model does not take.
    """
    kinds = (QuantizedLayer, PackedLayer, QuantAttentionProducts)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    macs = dict.fromkeys(layers, 0)
    counter = FlopCounterMode(display=False)
    handles = []
    for name, layer in layers.items():
        # Subtract what the counter shows before a layer runs, and add what it shows after. Looking names up in the
        # counter's own table would miss layers that have several names.
        def before(module: nn.Module, args: Any, name: str = name) -> None:  # noqa: ARG001
            macs[name] -= counter.get_total_flops() // 2

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:  # noqa: ARG001
            macs[name] += counter.get_total_flops() // 2

        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        with counter, _no_fused_encoders():
            run_in_float(model, [inputs])
    finally:
        for handle in handles:
            handle.remove()
    counted = []
    for name, layer in layers.items():
        weight_bits, activation_bits = _bits(layer)
        counted.append(LayerCost(name, macs[name], weight_bits, activation_bits))
    other_macs = counter.get_total_flops() // 2 - sum(macs.values())
    return Cost(tuple(counted), other_macs, float_parameters(model), *_storage(model))


@contextmanager
def _no_fused_encoders() -> Iterator[None]:
    """Let `nn.MultiheadAttention` and the encoder layers of torch run operator by operator inside the block.

    In evaluation they call one fused kernel for all of it, which torch's counter counts as nothing.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _bits(layer: QuantizedLayer | PackedLayer | QuantAttentionProducts) -> tuple[int, int]:
    if isinstance(layer, QuantAttentionProducts):
        bits = {quantizer.bits for quantizer in layer.own_quantizers()} or {FLOAT_BITS}
        assert len(bits) == 1, "all operands of an attention have the same bits"
        return 2 * (*bits,)  # type: ignore[return-value]
    quantizer: Any = layer if isinstance(layer, PackedLayer) else layer.weight_quantizer
    weight_bits = FLOAT_BITS if quantizer is None else quantizer.bits
    activation_bits = FLOAT_BITS if layer.activation_quantizer is None else layer.activation_quantizer.bits
    return weight_bits, activation_bits


def _storage(model: nn.Module) -> tuple[int, int]:
    """Count quantized parameters, and the bytes of all parameters with the values of quantizers."""
    quantized, floats, values = 0, 0, 0  # numbers of few bits, numbers of 32 bits, and values of quantizers
    stored = 0
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, PackedLayer):
            size = torch.Size(module.weight_shape).numel()
            quantized += size
            stored += packed_size(size, module.bits)
            values += module.weight_scale.numel() * (1 if module.weight_offset is None else 2)
        elif isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            size = module.weight.numel()
            stored += packed_size(size, module.weight_quantizer.bits)
            values += module.weight_quantizer.grid(module.weight)[0].numel() * (1 + module.weight_quantizer.has_offset)
            quantized += 0 if module.weight in seen else size
            seen.add(module.weight)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if not isinstance(module, Quantizer):
                floats += parameter.numel()
            elif module.role == "activation":
                values += parameter.numel()
    return quantized, stored + (floats + values) * FLOAT_BITS // 8


def _short(count: int) -> str:
    """Write a number with three digits and a prefix, such as `12.3 G`."""
    value = float(count)
    for prefix in ("", " k", " M", " G", " T"):
        if value < 999.5 or prefix == " T":
            break
        value /= 1000
    return f"{value:.3g}{prefix}" if value < 999.5 else f"{value:.0f}{prefix}"


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.1f} times less" if after else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} in quantized layers" if whole else ""

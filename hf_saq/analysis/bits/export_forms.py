"""Say in which forms an export holds a layer, depending on its bits: what costs the same is measured once.

A form is the operators and stored types of a layer. Integer kernels take codes of 2 to 8 bits alike, so few things
make another one: where weights are stored in 4 bits (`weights="int4"`) and fit; where the products of weights and
inputs of 8 bits are split into two halves (`target="cpu"`); where the grid of a weight keeps an offset, because its
codes do not fit (DoReFa, PACT and LIQ at 8 bits); and inputs of fewer than 8 bits, whose codes are clipped.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from torch import nn

from ...export.passes import may_saturate
from ...export.stored_grids import WeightGrid
from ...layers import QuantizedLayer
from ...quantizers import Quantizer
from .candidates import QuantizedOperand
from .changing import with_bits

Pair = tuple[int | None, int | None]
"""Bits of weights and of activations; `None` for an operand without a quantizer."""
FULL_BITS = 8
"""Codes of inputs are stored with as many; those of fewer are clipped."""


class LayerForm(NamedTuple):
    """Holds what of a layer depends on its bits.

    Attributes:
        stored: `"int8"`, `"int4"` or `"float"`; `""` for the products of an attention, which store nothing.
        offset: Whether its weights are codes times a scale plus an offset.
        halves: Whether its weight is split.
        inputs: `"whole"` for codes of 8 bits, `"clipped"` for fewer, `"float"` if they are not quantized.
    """

    stored: str
    offset: bool
    halves: bool
    inputs: str

    def __str__(self) -> str:
        weight = [self.stored, "with offset" if self.offset else "", "in two halves" if self.halves else ""]
        return ", ".join(filter(None, [" ".join(filter(None, weight)), f"inputs {self.inputs}"]))


def pairs_of(operands: dict[str, QuantizedOperand], candidates: Sequence[int]) -> list[Pair]:
    """List the bits that a layer has or may get, those that it has first."""
    choices: list[list[int | None]] = []
    for kind in ("weight", "activation"):
        choices.append([*dict.fromkeys([operands[kind].bits, *candidates])] if kind in operands else [None])
    return list(product(*choices))  # type: ignore[arg-type]


def forms_of(layer: nn.Module, name: str, pairs: Sequence[Pair], weights: str, target: str) -> dict[Pair, LayerForm]:
    """Find the form of `layer` with each pair of bits.

    Args:
        layer: A calibrated quantized layer, or the products of an attention; it is left as it is.
        name: Its name in the model, for errors.
        weights: That of `export_onnx`, and `target` too.
    """
    grids = {bits: _grid(layer, name, bits, weights) for bits, _ in pairs} if isinstance(layer, QuantizedLayer) else {}
    found = {}
    for pair in pairs:
        weight_bits, activation_bits = pair
        inputs = "float" if activation_bits is None else "clipped" if activation_bits < FULL_BITS else "whole"
        grid = grids.get(weight_bits)
        if grid is None:
            found[pair] = LayerForm("float" if grids else "", False, False, inputs)
            continue
        stored = "int4" if weights == "int4" and grid.fits("int4") else "int8"
        halves = (
            target == "cpu"
            and activation_bits is not None
            and getattr(layer, "groups", 1) == 1
            and may_saturate(grid.codes.numpy(), layer.channel_axis, 2**activation_bits - 1)  # type: ignore[arg-type]
        )
        found[pair] = LayerForm(stored, grid.offset is not None, halves, inputs)
    return found


def _grid(layer: Any, name: str, bits: int | None, weights: str) -> WeightGrid | None:
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, Quantizer) or bits is None:
        return None
    if bits != quantizer.bits:
        layer = copy.deepcopy(layer)
        layer.weight_quantizer = with_bits(quantizer, bits, layer.weight)
    return WeightGrid.of(layer, name, weights)

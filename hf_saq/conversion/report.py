"""Report what conversion does to each layer of a model, as a table that can be printed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..layers import PackedLayer, QuantAttentionProducts, QuantizedLayer
from ..quantizers import Quantizer
from ..tables import text_table


@dataclass
class LayerPlan:
    """Says what is to happen to one layer. `settings` is empty and `reason` says why where it stays in float.

    The products of an attention count as a layer, which has no weight; `layer_type` is then that of the attention.
    `sign` is that of the activations: `auto` until they are calibrated.
    """

    name: str
    layer_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    sign: str = "-"


@dataclass
class ConversionReport:
    """Holds what `quantize` did, layer by layer; `print(report)` shows a table.

    Attributes:
        first_last_modules: Names of the first layer and of the heads; `None` if they were treated like the rest.
        shared_inputs: Names of layers that quantize the tensor they all read once, group by group.
    """

    layers: list[LayerPlan]
    idle_layers_are_known: bool = False
    """Whether the model has been run, so that layers which it never calls are in float and listed as such."""
    first_last_modules: list[str] | None = None
    shared_inputs: list[list[str]] = field(default_factory=list)

    @property
    def converted(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.settings]

    @property
    def skipped(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if not layer.settings]

    def __str__(self) -> str:
        rows = [("module", "type", "W", "A", "sign of A", "quantizer", "note")]
        for layer in self.layers:
            bits = [str(layer.settings.get(k) or "float") for k in ("weight_bits", "activation_bits")]
            if layer.settings and "weight_bits" not in layer.settings:
                bits[0] = "-"
            quantizer = layer.settings.get("quantizer", "-")
            rows.append((layer.name, layer.layer_type, *bits, layer.sign, quantizer, layer.reason))
        text = f"{text_table(rows)}\n{len(self.converted)} layers quantized, {len(self.skipped)} left in float"
        if self.shared_inputs:
            readers = sum(map(len, self.shared_inputs))
            text += f"; {readers} of them read {len(self.shared_inputs)} tensors, which are quantized once"
        return text


def note_signs(model: nn.Module) -> None:
    """Write into the report of `model` which signs its activations have by now."""
    report = getattr(model, "quantization_report", None)
    modules = dict(model.named_modules())
    for planned in report.converted if isinstance(report, ConversionReport) else []:
        module = modules.get(planned.name)
        if isinstance(module, QuantAttentionProducts):
            *others, probability = (
                _sign(getattr(module, f"{operand}_quantizer")) for operand in ("query", "key", "value", "probability")
            )
            planned.sign = f"{'/'.join(dict.fromkeys(others))}, probabilities {probability}"
        elif isinstance(module, (QuantizedLayer, PackedLayer)):  # a user may have put something else there
            planned.sign = _sign(module.activation_quantizer)


def _sign(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "-"
    if quantizer.has_offset:
        return "affine"
    signed = quantizer.signed if quantizer.initialized else quantizer.settings.signed
    return {None: "auto", True: "signed", False: "unsigned"}[signed]


def float_parameters(model: nn.Module) -> int:
    """Count the parameters of the float model behind `model`: packed weights among them, values of quantizers not."""
    own = {p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    packed = [module for module in model.modules() if isinstance(module, PackedLayer)]
    count = sum(torch.Size(layer.weight_shape).numel() for layer in packed)
    return count + sum(parameter.numel() for parameter in model.parameters() if parameter not in own)

"""Copy a quantized model with integer layers in the place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import conversion
from ..layers import HoldsQuantizers, PackedLayer, QuantizedLayer
from ..layers.shared_input import SharedInput, refers_to_anothers_quantizer
from ..outputs import logits_of
from .integer_layers import IntegerActivation, IntegerLayer


@torch.no_grad()
def integer_copy(model: nn.Module, weights: str) -> nn.Module:
    """Copy `model` in evaluation mode, in float32, on the CPU; the layers of the copy keep their names.

    Raises:
        ValueError: If the model is not quantized or has no values, or if a grid does not fit into an integer graph.
        RuntimeError: If the model is not calibrated.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (QuantizedLayer, PackedLayer))}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; expected a model made by `quantize`, `pack` or "
            "`from_pretrained` of a quantized checkpoint."
        )
    conversion.check_has_values(model)
    conversion.refuse_uncalibrated(model, "export_onnx")
    integer: dict[nn.Module, IntegerLayer] = {
        layer: IntegerLayer(layer, name, weights) for name, layer in layers.items() if _is_quantized(layer)
    }
    _share_inputs(integer)
    replacements: dict[nn.Module, nn.Module] = {**integer}
    for module in model.modules():
        if isinstance(module, HoldsQuantizers) and not isinstance(module, QuantizedLayer):
            replacements.update({quantizer: IntegerActivation(quantizer) for quantizer in module.own_quantizers()})
    copied = conversion.copy_with(model, replacements).eval()
    # Not `copied.to`, which transformers forbids to models that were loaded quantized.
    nn.Module.to(copied, device="cpu", dtype=torch.float32)
    conversion.attention_interface.compute_openly(copied)
    return copied


def _share_inputs(integer: dict[nn.Module, IntegerLayer]) -> None:
    """Let the layers that share an input share it in their integer forms too: one node quantizes it."""
    readers: dict[Any, list[nn.Module]] = {}  # the one that holds the quantizer first
    for layer in sorted(integer, key=refers_to_anothers_quantizer):
        if layer.shared_input is not None:
            readers.setdefault(layer.activation_quantizer, []).append(layer)
    for layers in readers.values():
        shared, first = SharedInput(len(layers)), integer[layers[0]]
        for layer in layers:
            integer[layer].share_input(shared, None if integer[layer] is first else first.activation)


def _is_quantized(layer: QuantizedLayer | PackedLayer) -> bool:
    return isinstance(layer, PackedLayer) or bool(layer.own_quantizers())


class LogitsOnly(nn.Module):
    """Calls a model with one tensor and returns one: its logits, or what it returns if that is a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))

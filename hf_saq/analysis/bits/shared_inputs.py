"""Find quantized layers that read the same tensor: an engine quantizes it once, so they need the same bits for it."""

from __future__ import annotations

import torch
from torch import nn

from ...conversion.shared_inputs import readers_of_the_same_tensor
from ...layers import QuantizedLayer
from ...layers.shared_input import refers_to_anothers_quantizer
from ..batch_losses import LabelledBatches


@torch.no_grad()
def layers_that_share_inputs(model: nn.Module, data: LabelledBatches) -> list[list[str]]:
    """Run one batch, and group the names of layers that quantize the same tensor: two or more in each group."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and module.activation_quantizer is not None
    }
    return merged(readers_of_the_same_tensor(layers, lambda: data.loss(model, 0)))


def refuse_shared_quantizers(model: nn.Module, doing: str) -> None:
    """Raise `ValueError` if layers of `model` share the quantizer of their input, and so the bits of it."""
    shared = [name for name, module in model.named_modules() if refers_to_anothers_quantizer(module)]
    if shared:
        raise ValueError(
            f"{doing}: {len(shared)} layers, {shared[0]} for example, use the quantizer of another layer "
            "(share_inputs=True), so that operands cannot be looked at one by one. Expected a model quantized with "
            "share_inputs=False; the bits found suit both, since layers that read the same tensor get the same."
        )


def merged(groups: list[list[str]]) -> list[list[str]]:
    """Join groups that have a name in common."""
    result: list[list[str]] = []
    for group in groups:
        touching = [other for other in result if not set(other).isdisjoint(group)]
        result = [other for other in result if other not in touching]
        result.append(list(dict.fromkeys([name for other in [*touching, group] for name in other])))
    return result

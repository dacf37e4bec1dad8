"""Find quantized layers that read the same tensor: an engine quantizes it once, so they need the same bits for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers import QuantizedLayer
from ..batch_losses import LabelledBatches


@torch.no_grad()
def layers_that_share_inputs(model: nn.Module, data: LabelledBatches) -> list[list[str]]:
    """Run one batch, and group the names of layers that quantize the same tensor: two or more in each group."""
    readers: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # alive until the end, so that no other tensor gets the same identity

    def note(name: str):
        def before(layer: nn.Module, args: tuple) -> None:  # noqa: ARG001 (a forward hook)
            kept.append(args[0])
            names = readers.setdefault(id(args[0]), [])
            if name not in names:
                names.append(name)

        return before

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and module.activation_quantizer is not None
    ]
    try:
        data.loss(model, 0)
    finally:
        for handle in handles:
            handle.remove()
    return merged([names for names in readers.values() if len(names) > 1])


def merged(groups: list[list[str]]) -> list[list[str]]:
    """Join groups that have a name in common."""
    result: list[list[str]] = []
    for group in groups:
        touching = [other for other in result if not set(other).isdisjoint(group)]
        result = [other for other in result if other not in touching]
        result.append(list(dict.fromkeys([name for other in [*touching, group] for name in other])))
    return result

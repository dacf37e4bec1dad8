"""Find first scales of weights, and warn where they leave nothing of a layer's channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..layers import QuantizedLayer
from ..progress import with_progress
from ..quantizers.range_state import has_no_values

TOLERATED_ZERO_CHANNELS = 0.25
"""Share of a layer's output channels that may round to zero without a warning: at 2 bits a few always do."""


@torch.no_grad()
def initialize_weight_quantizers(model: nn.Module, layers: Mapping[str, nn.Module] | None = None) -> None:
    """Fit every weight quantizer that has no range yet to the weight it will quantize.

    On the meta device there is nothing to fit to: such quantizers get their values when a state dict is loaded.

    Warns where one scale for the whole tensor leaves nothing of many output channels, as in depthwise convolutions
    whose channels differ by orders of magnitude.

    Args:
        layers: Layers that are not in `model` yet, by the names that they will have there; `None`: those of `model`.
    """
    damaged = []
    found = (dict(model.named_modules()) if layers is None else layers).items()
    quantized = [(name, module) for name, module in found if isinstance(module, QuantizedLayer)]
    for name, module in with_progress(quantized, "first scales"):
        if module.weight_quantizer is not None:
            if not module.weight_quantizer.initialized and not has_no_values(module.weight):
                module.weight_quantizer.initialize(module.weight)
                zero, channels = channels_rounded_to_zero(module)
                if zero > TOLERATED_ZERO_CHANNELS * channels:
                    damaged.append(f"{name} ({zero} of {channels})")
    if damaged:
        warnings.warn(
            f"{type(model).__name__}: one weight scale for a whole tensor rounds all weights of many output channels "
            f"to zero, in {len(damaged)} layers: {', '.join(damaged)}. Use weight_granularity='channel', more "
            "weight_bits or `overrides` for these layers; otherwise training starts from a model that lacks these "
            "channels.",
            stacklevel=3,
        )


def channels_rounded_to_zero(layer: QuantizedLayer) -> tuple[int, int]:
    """Count the output channels whose weights all become zero although they are not, and all output channels."""
    assert layer.weight_quantizer is not None
    channels = layer.weight.shape[layer.channel_axis]
    if layer.weight_quantizer.has_offset:
        return 0, channels  # code 0 does not stand for zero
    codes = layer.weight_quantizer.quantize(layer.weight).movedim(layer.channel_axis, 0).flatten(1)
    values = layer.weight.movedim(layer.channel_axis, 0).flatten(1)
    return int(((codes == 0).all(dim=1) & (values != 0).any(dim=1)).sum()), channels

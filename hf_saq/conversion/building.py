"""Build one quantized layer, or the quantized products of one attention, from the settings planned for it; and read
such settings from what was built."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers import HoldsQuantizers, PackedLayer, QuantAttentionProducts, QuantizedLayer, quantized_form
from ..quantizers import QUANTIZERS, Quantizer, QuantizerSettings, check_activation_mode, quantizer_class

_SIGNED = {"auto": None, "signed": True, "unsigned": False, "affine": None}


def build(layer: nn.Module, name: str, settings: dict[str, Any]) -> QuantizedLayer:
    """Build the quantized form of one float layer, its quantizers not yet initialized."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    form = quantized_form(layer)
    assert form is not None
    per_channel = tuple(size if axis == form.channel_axis else 1 for axis, size in enumerate(weight.shape))
    weight_quantizer: Quantizer | None = None
    activation_quantizer: Quantizer | None = None
    if settings["weight_bits"] is not None:
        scale_shape = per_channel if settings["weight_granularity"] == "channel" else (1,)
        wanted = QuantizerSettings(settings["weight_bits"], "weight", True, scale_shape, settings["scale_init"])
        weight_quantizer = _make(settings["quantizer"], wanted, f"{name}.weight_quantizer", weight.device)
    if settings["activation_bits"] is not None:
        activation_quantizer = _activation_quantizer(f"{name}.activation_quantizer", settings, weight.device)
    return form.from_float(layer, weight_quantizer, activation_quantizer)


def build_products(attention: nn.Module, name: str, settings: dict[str, Any]) -> QuantAttentionProducts:
    """Build the products of one attention module, their quantizers not yet initialized; `name` is theirs."""
    device = next((tensor.device for tensor in attention.parameters()), torch.device("cpu"))
    quantizers: dict[str, Quantizer | None] = {}
    for operand in ("query", "key", "value"):
        path = f"{name}.{operand}_quantizer"
        quantizers[f"{operand}_quantizer"] = _activation_quantizer(path, settings, device)
    # A softmax has no negative values, and the zero of a grid without offset is its most common one.
    probability = _activation_quantizer(
        f"{name}.probability_quantizer", {**settings, "activation_mode": "unsigned"}, device
    )
    products = QuantAttentionProducts(**quantizers, probability_quantizer=probability)
    products.path = name
    return products.train(attention.training)


def _activation_quantizer(path: str, settings: dict[str, Any], device: torch.device) -> Quantizer:
    where = f"{path.rpartition('.')[0]}: "
    check_activation_mode(where, settings["quantizer"], settings["activation_mode"])
    signed = _SIGNED[settings["activation_mode"]]
    wanted = QuantizerSettings(settings["activation_bits"], "activation", signed, scale_init=settings["scale_init"])
    return _make(settings["quantizer"], wanted, path, device)


def _make(kind: str, settings: QuantizerSettings, path: str, device: torch.device) -> Quantizer:
    with device:  # also inside of `torch.device("meta")`
        quantizer = quantizer_class(kind)(settings)
    if device.type != "meta" and any(tensor.is_meta for tensor in (*quantizer.parameters(), *quantizer.buffers())):
        raise ValueError(
            f"{path}: something puts every new parameter on the meta device, as accelerate's init_empty_weights() "
            f"does, and the weight is on {device}. Build the model in that block, and quantize it after the block."
        )
    quantizer.path = path
    return quantizer


def settings_of(layer: HoldsQuantizers | PackedLayer) -> dict[str, Any]:
    """Find settings that make a layer, or attention products, quantized as `layer` is; empty if it is in float.

    Raises:
        ValueError: If its quantizer is not a registered one.
    """
    if isinstance(layer, QuantAttentionProducts):
        return _settings(None, layer.query_quantizer)
    weight = layer._functional.weight_quantizer if isinstance(layer, PackedLayer) else layer.weight_quantizer
    return _settings(weight, layer.activation_quantizer)  # type: ignore[arg-type]


def _settings(weight: Quantizer | None, activation: Quantizer | None) -> dict[str, Any]:
    one = weight or activation
    if one is None:
        return {}
    kinds = [name for name, kind in QUANTIZERS.items() if kind is type(one)]
    if not kinds:
        raise ValueError(
            f"{one.path}: {type(one).__name__} is none of the registered quantizers, {sorted(QUANTIZERS)}, by whose "
            "names models are stored. Add it to hf_saq.quantizers.QUANTIZERS."
        )
    per_tensor = weight is None or weight.scale_shape == (1,)
    signs = {sign: mode for mode, sign in reversed(_SIGNED.items())}  # None is "auto", which LSQ+ takes as "affine"
    return {
        "weight_bits": None if weight is None else weight.bits,
        "activation_bits": None if activation is None else activation.bits,
        "quantizer": kinds[0],
        "weight_granularity": "tensor" if per_tensor else "channel",
        "activation_mode": signs[None if activation is None else activation.settings.signed],
        "scale_init": one.scale_init,
    }

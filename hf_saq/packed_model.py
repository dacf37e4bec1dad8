"""Whole models between their trainable, packed and plain float forms."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .config import SAQQuantizationConfig
from .conversion import convert, replace_modules
from .layers import PackedLayer, QuantizedLayer


def pack(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose weights are packed integers: small on disk and in memory, for inference only.

    The latent float weights are dropped; keep a float-storage checkpoint to go on training.

    Raises:
        ValueError: If the model has no quantized weight.
        RuntimeError: If a weight quantizer was never initialized.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer) and m.weight_quantizer is not None]
    if not layers:
        found = "is packed already" if is_packed(model) else "has no layer with quantized weights"
        raise ValueError(f"{type(model).__name__} {found}; expected a model made by `quantize` or `from_pretrained`.")
    # Latent weights are not worth copying: the packed layer that replaces them holds only their codes.
    memo: dict[int, object] = {}
    for layer in layers:
        with torch.no_grad():
            memo[id(layer)] = _packed_copy(layer)
    packed = copy.deepcopy(model, memo)
    _set_storage(packed, "packed")
    return packed.eval()


def convert_to_packed(model: nn.Module, config: SAQQuantizationConfig) -> None:
    """Swap the layers of a float `model`, in place, for packed ones whose codes are still to be loaded."""
    convert(model, config)
    replace_modules(
        model,
        {
            layer: PackedLayer.skeleton(layer)
            for layer in model.modules()
            if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None
        },
    )


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in model.modules())


def _packed_copy(layer: QuantizedLayer) -> PackedLayer:
    packed = PackedLayer.from_quantized(layer)
    # Everything the two forms share is copied, so that the packed model is independent of the original.
    packed.bias = copy.deepcopy(layer.bias)
    packed.activation_quantizer = copy.deepcopy(layer.activation_quantizer)
    return packed


def _set_storage(model: nn.Module, storage: str) -> None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SAQQuantizationConfig):
        model.config.quantization_config = config.replace(storage=storage)  # type: ignore[union-attr]

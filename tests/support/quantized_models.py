"""Quantized models that are far from every first value, and what two of them are compared by."""

from __future__ import annotations

import torch
from tiny_models import images, jitter, vit
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.layers import PackedLayer, QuantizedLayer


def quantized(build=vit, x: Tensor | None = None, **fields) -> nn.Module:
    """A model quantized, calibrated on `x` (images unless given), then moved away from every first value, so that no
    default can pass for one of its values."""
    model = quantize(build(), SAQQuantizationConfig(**fields))
    return jitter(calibrate(model, [images() if x is None else x])).eval()


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Integer codes of each quantized weight, of a trainable or of a packed model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            found[name] = module.codes()
        elif isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            found[name] = module.weight_quantizer.quantize(module.weight)
    return found


def assert_same_codes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[name], b[name]) for name in a)


def storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and same_values(first[name], second[name]), name


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN with NaN: learned values are NaN before calibration."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def bits(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """`(weight bits, activation bits)` of each quantized layer, as built."""
    return {
        name: tuple(q and q.bits for q in (layer.weight_quantizer, layer.activation_quantizer))
        for name, layer in layers(model).items()
    }

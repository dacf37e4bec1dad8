"""What inspection finds in checkpoints, compared with the models that were saved."""

from __future__ import annotations

import pytest
import torch
from tiny_models import convnext, deit_with_teacher, images, vit

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.layers import PackedLayer, QuantizedLayer
from hf_saq.layers.packing import packed_size
from hf_saq.storage.inspection import inspect_checkpoint


def quantized(build=vit, **fields):
    model = quantize(build(), SAQQuantizationConfig(**{"weight_bits": 3, "activation_bits": 5, **fields}))
    return calibrate(model, [images(8)]).eval()


@pytest.mark.parametrize("build", [vit, convnext, deit_with_teacher])
@pytest.mark.parametrize("storage", ["float", "packed"])
def test_inspect_finds_what_the_model_holds(build, storage: str, tmp_path):
    """Compared with the model in memory, whose tensors have other names than those on disk in a ViT."""
    model = quantized(build, weight_granularity="channel")
    stored = pack(model) if storage == "packed" else model
    stored.save_pretrained(tmp_path)
    found = inspect_checkpoint(str(tmp_path))
    assert found.architecture == type(model).__name__
    assert sum(found.files.values()) == (tmp_path / "model.safetensors").stat().st_size
    layers = {layer.name: layer for layer in found.layers}
    expected = {name: m for name, m in stored.named_modules() if isinstance(m, (QuantizedLayer, PackedLayer))}
    assert layers.keys() == expected.keys()
    for name, module in expected.items():
        layer = layers[name]
        if isinstance(module, PackedLayer):
            bits, scale = module.bits, module.weight_scale
            size = packed_size(torch.Size(module.weight_shape).numel(), bits)
        else:
            bits, scale = module.weight_quantizer.bits, module.weight_quantizer.scale
            size = module.weight.numel() * 4
        assert layer.weight_bits == bits and layer.activation_bits == module.activation_quantizer.bits
        assert layer.weight_bytes == size
        assert (layer.scales, layer.scale_min, layer.scale_max) == (
            scale.numel(),
            scale.min().item(),
            scale.max().item(),
        )

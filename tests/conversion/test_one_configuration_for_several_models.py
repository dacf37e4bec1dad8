"""Models that are built from one configuration object: each is quantized, stored and restored as what it is itself."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VIT_SIZES, images
from transformers import CLIPConfig, CLIPForImageClassification, ViTConfig, ViTForImageClassification

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize

X = images(4)


@pytest.mark.parametrize("is_packed", [False, True])
def test_each_is_stored_with_its_own_bits(tmp_path, is_packed):
    config = ViTConfig(**VIT_SIZES)
    first, second = (ViTForImageClassification(config).eval() for _ in range(2))
    for model, bits in ((first, 4), (second, 2)):
        calibrate(quantize(model, SAQQuantizationConfig(weight_bits=bits)), [X])
    stored = pack(first) if is_packed else first
    stored.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.quantization_config.weight_bits == 4
    torch.testing.assert_close(loaded(X).logits, stored(X).logits, rtol=0, atol=0)
    assert not hasattr(config, "quantization_config")


def test_a_float_model_stays_one(tmp_path):
    config = ViTConfig(**VIT_SIZES)
    teacher, student = (ViTForImageClassification(config).eval() for _ in range(2))
    implementation = teacher.config._attn_implementation
    quantize(student, SAQQuantizationConfig(quantize_attention=True))
    assert teacher.config._attn_implementation == implementation != student.config._attn_implementation
    teacher.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(X).logits, teacher(X).logits, rtol=0, atol=0)


def test_parts_go_on_sharing_what_is_nested():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(vision_config={**sizes, "image_size": 16, "patch_size": 8}, num_labels=3)
    model = quantize(CLIPForImageClassification(config), SAQQuantizationConfig())
    assert model.config is not config
    assert model.vision_model.config is model.config.vision_config
    assert model.vision_model.config is not config.vision_config

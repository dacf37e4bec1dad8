"""Models of transformers inside of a quantized one, saved or loaded alone: they are quantized as they were in it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import IMAGE_SIZE, images, seeded
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
)

from hf_saq import SAQQuantizationConfig, calibrate, dequantize, pack, quantize
from hf_saq.conversion import configuration_of
from hf_saq.conversion.planning import plan
from hf_saq.export.layout import check_free

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SIZES, "image_size": IMAGE_SIZE, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1}


def clip() -> PreTrainedModel:
    with seeded(0):
        return CLIPForImageClassification(CLIPConfig(vision_config=VISION, text_config=TEXT, num_labels=3))


def siglip() -> PreTrainedModel:
    with seeded(0):
        return SiglipForImageClassification(SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=3))


class Net(nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.backbone, self.head = Dinov2Model(Dinov2Config(**VISION)), nn.Linear(16, 3)

    def forward(self, pixel_values):
        return self.head(self.backbone(pixel_values).pooler_output)


def quantized(build, **fields) -> nn.Module:
    return calibrate(quantize(build(), SAQQuantizationConfig(weight_bits=3, **fields)), [images()]).eval()


@torch.no_grad()
def features(part: nn.Module) -> torch.Tensor:
    return part.eval()(images(seed=1)).last_hidden_state


@pytest.mark.parametrize("form", ["float", "packed"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"quantize_attention": True, "overrides": {"backbone.encoder.layer.1.attention": {"activation_bits": 2}}},
        {"share_inputs": True, "shared_input_modules": [[f"backbone.encoder.layer.0.mlp.fc{n}" for n in (1, 2)]]},
        {"quantizer": "lsq_plus", "weight_granularity": "channel", "modules_to_not_convert": ["*layer.0.mlp.*"]},
        {"activation_bits": None, "overrides": {"*.fc1": {"quantizer": "liq", "activation_bits": 5}}},
    ],
    ids=["plain", "attention", "shared", "excluded", "overrides"],
)
def test_a_backbone_in_a_model_of_ones_own_is_saved_alone(fields, form, tmp_path):
    """It was saved without a word of its quantization, and loaded in float."""
    net = quantized(Net, **fields)
    net = pack(net) if form == "packed" else net
    net.backbone.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["storage"] == form
    assert torch.equal(features(Dinov2Model.from_pretrained(tmp_path)), features(net.backbone))


@pytest.mark.parametrize("build", [clip, siglip])
@pytest.mark.parametrize("form", ["float", "packed"])
def test_a_tower_is_saved_alone(build, form, tmp_path):
    model = quantized(build)
    tower = (pack(model) if form == "packed" else model).vision_model
    tower.save_pretrained(tmp_path)
    assert torch.equal(features(type(tower).from_pretrained(tmp_path)), features(tower))


@pytest.mark.parametrize("build", [clip, siglip])
def test_a_tower_is_loaded_from_the_checkpoint_of_the_whole(build, tmp_path):
    """It has a configuration of its own inside that of the whole: from float storage it was loaded in float."""
    model = quantized(build, overrides={"vision_model.encoder.layers.1": {"weight_bits": 6}})
    model.save_pretrained(tmp_path)
    tower = type(model.vision_model)
    assert torch.equal(features(tower.from_pretrained(tmp_path)), features(model.vision_model))
    whole = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(whole(images(seed=1)).logits, model(images(seed=1)).logits)
    assert whole.config.quantization_config == model.config.quantization_config


def test_from_a_float_checkpoint(tmp_path):
    clip().save_pretrained(tmp_path / "float")
    config = SAQQuantizationConfig()
    model = CLIPForImageClassification.from_pretrained(tmp_path / "float", quantization_config=config)
    calibrate(model, [images()]).vision_model.save_pretrained(tmp_path / "tower")
    assert torch.equal(features(CLIPVisionModel.from_pretrained(tmp_path / "tower")), features(model.vision_model))


def test_other_forms_leave_no_trace(tmp_path):
    """What a part says of itself belongs to float storage; it is no other model for an export beside it."""
    model = quantized(clip)
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" in model.config.vision_config.to_dict()
    pack(model).save_pretrained(tmp_path / "packed")
    assert "quantization_config" not in json.loads((tmp_path / "packed" / "config.json").read_text())["vision_config"]
    check_free(tmp_path / "packed", overwrite=True, model=model)
    model.config.vision_config.hidden_act = "relu"
    with pytest.raises(ValueError, match="holds another model, whose config.json differs in vision_config"):
        check_free(tmp_path / "packed", overwrite=True, model=model)
    assert "quantization_config" not in dequantize(model).config.vision_config.to_dict()


def test_a_part_of_which_nothing_is_quantized(tmp_path):
    model = quantized(clip, modules_to_not_convert=["vision_model"])
    assert configuration_of(model.vision_model) is None
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "tower")
    for directory in ("whole", "tower"):
        assert torch.equal(
            features(CLIPVisionModel.from_pretrained(tmp_path / directory)), features(model.vision_model)
        )
    assert "quantization_config" not in json.loads((tmp_path / "tower" / "config.json").read_text())


def test_a_description_decides_as_was_decided():
    """Layer by layer, for a whole model too."""
    fields = {"quantize_attention": True, "overrides": {"*.fc1": {"weight_bits": 5, "scale_init": "mean"}}}
    model = quantized(Net, **fields)
    before = {layer.name: layer.settings for layer in model.quantization_report.converted}
    found = configuration_of(model)
    again = {layer.name: layer.settings for layer in plan(Net(), found, stored=True).converted}
    assert again == before

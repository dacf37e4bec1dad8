"""What people do with a stored quantized model: load a part of it, put it under another head, carry on from there.

Whatever part is loaded, it computes what it computed in the model that was saved, or loading says why it cannot.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit_config, edit_weights, load
from quantized_models import bits, quantized
from tiny_models import TRANSFORMERS_MODELS, images, vit
from torch import nn
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize, unpack
from hf_saq.conversion import is_calibrated, is_packed
from hf_saq.layers import PackedLayer, QuantizedLayer

W2 = {"weight_bits": 2, "activation_bits": 4}
"""Far from the 8 bits of the first layer and of the head, so that a mix-up shows."""


def dinov2() -> nn.Module:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, num_labels=3
    )
    torch.manual_seed(0)
    return Dinov2ForImageClassification(config)


FAMILIES = {**TRANSFORMERS_MODELS, "dinov2": dinov2}
in_both_forms = pytest.mark.parametrize("form", ["float", "packed"])


def in_form(model: nn.Module, form: str) -> nn.Module:
    return pack(model) if form == "packed" else model


def unmapped(model: nn.Module) -> nn.Module:
    """Its tensors at addresses where equal inputs give equal outputs, see `checkpoint_files.load`."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval()


@torch.no_grad()
def features(base: nn.Module) -> torch.Tensor:
    return base(images(seed=1)).last_hidden_state


# As the base model -------------------------------------------------------------------------------------------------


@in_both_forms
@pytest.mark.parametrize("saved", ["the classifier", "its base model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_taken_from_a_stored_classifier(family, saved, form, tmp_path):
    """`AutoModel.from_pretrained(classifier)`, or `classifier.base_model.save_pretrained` and then the same: the
    features are those inside of the classifier."""
    model = in_form(quantized(FAMILIES[family], **W2), form)
    (model if saved == "the classifier" else model.base_model).save_pretrained(tmp_path)
    loaded = unmapped(AutoModel.from_pretrained(tmp_path))
    assert is_packed(loaded) == (form == "packed")
    assert torch.equal(features(loaded), features(model.base_model))


@in_both_forms
def test_the_base_model_is_saved_again(form, tmp_path):
    """A base model that came from a classifier is saved and loaded as often as one likes."""
    model = in_form(quantized(dinov2, **W2), form)
    model.save_pretrained(tmp_path / "0")
    for i in range(2):
        Dinov2Model.from_pretrained(tmp_path / str(i)).save_pretrained(tmp_path / str(i + 1))
    assert torch.equal(features(unmapped(Dinov2Model.from_pretrained(tmp_path / "2"))), features(model.base_model))


@in_both_forms
@pytest.mark.parametrize("saved", ["the classifier", "its base model"])
@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_not_convert": ["classifier", "vit.layers.0.mlp"]},
        {"overrides": {"vit.layers.1": {"weight_bits": 5}, "classifier": {"weight_bits": 3}}},
        {"overrides": {"layers.1": {"weight_bits": 5}}},
        {"overrides": {"vit.*.fc1": {"weight_bits": 6}, "layers.?.mlp.fc1": {"activation_bits": None}}},
        {"first_last_bits": None},
        {"first_last_modules": ["vit.layers.0.attention", "classifier"]},
        {"quantize_attention": True, "overrides": {"vit.layers.0.attention.products": {"activation_bits": 2}}},
    ],
    ids=["excluded", "overrides", "without-prefix", "globs", "no-edges", "own-edges", "attention"],
)
def test_names_in_a_configuration_mean_the_same_layers_in_the_base_model(fields, saved, form, tmp_path):
    """Names and globs were written for the classifier, or without the prefix its base model has there."""
    model = quantized(**W2, **fields)
    whole = in_form(model, form)
    (whole if saved == "the classifier" else whole.base_model).save_pretrained(tmp_path)
    loaded = unmapped(ViTModel.from_pretrained(tmp_path, add_pooling_layer=False))
    if form == "float":
        assert bits(loaded) == bits(model.vit)
    assert torch.equal(features(loaded), features(model.vit))


@in_both_forms
def test_a_pooler_that_was_not_stored_stays_in_float(form, tmp_path, caplog):
    """`AutoModel` gives a ViT a pooler that its classifier never had: it is new, as transformers reports, and so has
    no bits that anybody chose. Saved and loaded it stays what it is."""
    model = in_form(quantized(**W2), form)
    model.save_pretrained(tmp_path / "classifier")
    with caplog.at_level(logging.WARNING, "hf_saq"):
        base = unmapped(AutoModel.from_pretrained(tmp_path / "classifier"))
    assert "ViTModel: pooler.dense not in the checkpoint: newly initialized and left in float." in caplog.text
    pooler = base.pooler.dense
    assert not isinstance(pooler, PackedLayer) and getattr(pooler, "weight_quantizer", None) is None
    assert pooler.weight.shape == (16, 16) and 0 < pooler.weight.std() < 1 and not pooler.bias.any()
    base.save_pretrained(tmp_path / "base")
    again = unmapped(AutoModel.from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        found, expected = again(images()), base(images())
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_what_was_decided_is_stored_with_the_model_and_nowhere_else(tmp_path):
    """One configuration object quantizes several models, each of which remembers its own first layer and head."""
    config = SAQQuantizationConfig(**W2)
    first, second = (quantize(FAMILIES[family](), config) for family in ("vit", "resnet"))
    assert config == SAQQuantizationConfig(**W2)
    first.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 2
    assert stored["first_last_modules"] == ["vit.embeddings.patch_embeddings.projection", "classifier"]
    assert second.config.quantization_config.first_last_modules == [
        "resnet.embedder.embedder.convolution",
        "classifier.1",
    ]
    vit().save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float", quantization_config=config)
    assert loaded.config.quantization_config.first_last_modules == stored["first_last_modules"]
    assert config == SAQQuantizationConfig(**W2)


def test_a_head_of_the_users_choice():
    """`first_last_modules` names what is to have `first_last_bits`; a name that means nothing is a mistake."""
    model = quantize(vit(), SAQQuantizationConfig(**W2, first_last_modules=["layers.1.mlp.fc2", "classifier"]))
    assert {name for name, (weight, _) in bits(model).items() if weight == 8} == {"vit.layers.1.mlp.fc2", "classifier"}
    with pytest.raises(ValueError, match="^first_last_modules: 'head' matches no module"):
        quantize(vit(), SAQQuantizationConfig(first_last_modules=["head"]))


def test_a_stored_list_of_another_model_is_refused(tmp_path):
    quantized(**W2).save_pretrained(tmp_path)
    edit_config(tmp_path, first_last_modules=["resnet.embedder", "fc"])
    with pytest.raises(ValueError, match=r"first_last_modules: none of \['resnet.embedder', 'fc'\] is a module"):
        load(tmp_path)


def test_a_packed_file_of_version_2_does_not_fit_another_list(tmp_path):
    """The list decides about bits of activations, which no tensor shows, so the seal covers it."""
    pack(quantized(**W2)).save_pretrained(tmp_path)
    edit_config(tmp_path, first_last_modules=["classifier"])
    with pytest.raises(ValueError, match=r"quantization_config.first_last_modules is \['classifier'\], but"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["vit", "mobilenet_v2"])
def test_a_float_file_of_version_1(family, tmp_path):
    """It does not say which layers came first and last: they are those of the class that was saved."""
    model = quantized(FAMILIES[family], **W2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["first_last_modules"], config["quantization_config"]["modules_found_idle"]
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config))
    base = unmapped(AutoModel.from_pretrained(tmp_path))
    assert torch.equal(features(base), features(model.base_model))
    whole = load(tmp_path)
    assert torch.equal(whole(images()).logits, model(images()).logits)
    assert whole.config.quantization_config == model.config.quantization_config


# Under another head ------------------------------------------------------------------------------------------------


def new_classes(directory: Path, **kwargs) -> nn.Module:
    return load(directory, num_labels=7, ignore_mismatched_sizes=True, **kwargs)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "liq", "pact", "dorefa"])
def test_other_classes_get_a_head_with_scales_of_its_own(quantizer, granularity, tmp_path):
    """`num_labels=7, ignore_mismatched_sizes=True`: transformers makes a new head; the scales of the old one, which
    had far larger weights, would round it to zero. Its input is what it was, and keeps its range."""
    model = quantized(quantizer=quantizer, weight_granularity=granularity)
    with torch.no_grad():
        model.classifier.weight.mul_(1000)
        model.classifier.weight_quantizer.initialize(model.classifier.weight)
    model.save_pretrained(tmp_path)
    loaded = new_classes(tmp_path)
    head = loaded.classifier
    assert head.weight.shape == (7, 16)
    fitted = head.weight_quantizer.blank_copy()
    fitted.initialize(head.weight)
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(head.weight_quantizer.state_dict()[name], tensor), name
    for name, tensor in model.classifier.activation_quantizer.state_dict().items():
        assert torch.equal(head.activation_quantizer.state_dict()[name], tensor), name
    error = (head.quantized_weight() - head.weight).norm() / head.weight.norm()
    assert error < 0.05  # 8 bits
    assert is_calibrated(loaded) and loaded(images()).logits.shape == (4, 7)
    assert torch.equal(features(loaded.vit), features(model.vit))


def test_other_classes_for_a_packed_model(tmp_path):
    """Packed weights cannot be made anew; the error says how to get there, and that way works."""
    model = quantized()
    pack(model).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="If classifier is to be new, .* `hf_saq.unpack` this model as it is, save"):
        new_classes(tmp_path / "packed")
    unpack(load(tmp_path / "packed")).save_pretrained(tmp_path / "float")
    loaded = new_classes(tmp_path / "float")
    assert loaded.classifier.weight.shape == (7, 16) and loaded(images()).logits.shape == (4, 7)


def test_a_stored_base_model_under_a_new_head(tmp_path):
    """The head is new: quantized with `first_last_bits` like any head, and calibrated before it runs."""
    model = quantized(**W2)
    model.vit.save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float")
    assert bits(loaded) == bits(model)
    assert loaded.classifier.weight_quantizer.initialized and not loaded.classifier.activation_quantizer.initialized
    with pytest.raises(RuntimeError, match="^classifier.activation_quantizer: this activation quantizer has no range"):
        loaded(images())
    assert torch.equal(features(loaded.vit), features(model.vit))
    assert is_calibrated(calibrate(loaded, [images()]))
    pack(model).vit.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"lacks 6 tensor\(s\) .* If classifier is to be new"):
        load(tmp_path / "packed")


def test_another_task_on_a_stored_classifier(tmp_path):
    """Masked image modelling takes the body of a classifier; its decoder is new, as in float."""
    model = quantized(**W2)
    model.save_pretrained(tmp_path)
    loaded = ViTForMaskedImageModeling.from_pretrained(tmp_path)
    assert bits(loaded.vit) == bits(model.vit)
    decoder = [m for m in loaded.decoder.modules() if isinstance(m, QuantizedLayer)]
    assert len(decoder) == 1 and decoder[0].weight_quantizer.initialized


class TwoHeads(ViTForImageClassification):
    """A subclass with a head of its own next to that of the checkpoint."""

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.hidden_size, 5)
        self.post_init()


def test_a_subclass_with_one_more_head(tmp_path):
    model = quantized(**W2)
    model.save_pretrained(tmp_path)
    loaded = unmapped(TwoHeads.from_pretrained(tmp_path))
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    assert loaded.second.weight_quantizer.initialized and not loaded.second.activation_quantizer.initialized


def test_a_layer_of_the_body_that_lost_its_quantizers_is_refused(tmp_path):
    """Weights without their scales are half a checkpoint, not a new layer."""
    quantized().save_pretrained(tmp_path)

    def lose(tensors):
        for name in [name for name in tensors if "intermediate" in name and "quantizer" in name]:
            del tensors[name]

    edit_weights(tmp_path, lose)
    with pytest.raises(ValueError, match=r"lacks 8 tensor\(s\) of the quantized model"):
        load(tmp_path)

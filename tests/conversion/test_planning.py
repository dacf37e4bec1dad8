"""Which layers are quantized, with which bits, and why the others are left in float."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from quantized_models import bits, layers
from tiny_models import (
    conv_net,
    convnext,
    deit_with_teacher,
    linear_net,
    mobilenet_v2,
    resnet,
    vectors,
    vit,
)
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_saq import SAQQuantizationConfig, quantize
from hf_saq.conversion.planning import plan
from hf_saq.conversion.structure import first_and_heads
from hf_saq.layers import QuantConv2d

FLOAT = SAQQuantizationConfig(weight_bits=None, activation_bits=None)
W4A4 = SAQQuantizationConfig()


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_layers_left_in_float_have_a_reason():
    model = nn.Sequential(
        ScaledLinear(6, 6),
        nn.Linear(6, 6),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.MultiheadAttention(6, 2),
        nn.ConvTranspose2d(3, 3, 2),
        nn.Conv3d(3, 3, 2),
        nn.Embedding(3, 6),
    )
    expected = copy.deepcopy(model[0])(vectors())
    quantize(model, W4A4)
    assert [layer.name for layer in model.quantization_report.converted] == ["1"]
    assert {layer.name: (layer.layer_type, layer.reason) for layer in model.quantization_report.skipped} == {
        "0": ("ScaledLinear", "a subclass of Linear may compute something else"),
        "2": ("ParametrizedLinear", "a subclass of Linear may compute something else"),
        "3": ("MultiheadAttention", "its projections are raw parameters of one fused function"),
        "3.out_proj": (
            "NonDynamicallyQuantizableLinear",
            "its weight is read by the attention that holds it, which does not call the layer",
        ),
        "4": ("ConvTranspose2d", "this convolution has no quantized form"),
        "5": ("Conv3d", "this convolution has no quantized form"),
    }
    assert torch.equal(model[0](vectors()), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_weight_that_is_computed_stays_in_float():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))
    quantize(model, W4A4)
    assert model.quantization_report.skipped[0].reason == "its weight is computed from other parameters"
    assert list(layers(model)) == ["1"]


def test_a_weight_shared_with_an_embedding_stays_in_float():
    """Packed, the two could no longer be one tensor."""
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 6), "body": nn.Linear(6, 6), "head": nn.Linear(6, 5)})
    model["head"].weight = model["tokens"].weight
    quantize(model, W4A4)
    assert list(layers(model)) == ["body"]
    assert (
        model.quantization_report.skipped[0].reason == "its weight is shared with tokens, which has no quantized form"
    )


class Marked(nn.Conv2d):
    """A torch layer under another name: what it computes is the same."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)


def test_a_subclass_that_adds_nothing_but_a_constructor_is_quantized():
    model = quantize(nn.Sequential(Marked(3), nn.Linear(3, 3)), W4A4)
    assert list(layers(model)) == ["0", "1"] and type(model[0]) is QuantConv2d


# First layer and heads -----------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A transformers model inside of something else: its structure is still to be seen only by order."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    ("build", "edges"),
    [
        (vit, {"vit.embeddings.patch_embeddings.projection", "classifier"}),
        (resnet, {"resnet.embedder.embedder.convolution", "classifier.1"}),
        (convnext, {"convnext.embeddings.patch_embeddings", "classifier"}),
        (mobilenet_v2, {"mobilenet_v2.conv_stem.first_conv.convolution", "classifier"}),
        (
            deit_with_teacher,
            {"deit.embeddings.patch_embeddings.projection", "cls_classifier", "distillation_classifier"},
        ),
        (lambda: timm.create_model("test_vit", num_classes=5), {"patch_embed.proj", "head"}),
        (lambda: timm.create_model("test_resnet", num_classes=5), {"conv1.0", "fc"}),
        (lambda: timm.create_model("test_vit", num_classes=0), {"patch_embed.proj", "blocks.5.mlp.fc2"}),
        (linear_net, {"0", "4"}),
        (conv_net, {"0", "7"}),
        (lambda: Wrapper(resnet()), {"inner.resnet.embedder.embedder.convolution", "inner.classifier.1"}),
        (lambda: nn.Sequential(nn.ReLU()), set()),
    ],
    ids="vit resnet convnext mobilenet_v2 deit timm-vit timm-resnet timm-headless linear conv wrapped none".split(),
)
def test_first_layer_and_heads_are_found_by_structure(build, edges):
    assert first_and_heads(build()) == edges


def test_named_edges_without_bits_of_their_own():
    config = SAQQuantizationConfig(first_last_bits=None, first_last_modules=["classifier"])
    with pytest.raises(
        ValueError, match=r"first_last_modules=\['classifier'\] with first_last_bits=None: .* no effect"
    ):
        quantize(vit(), config)


def test_embeddings_before_what_is_called_the_base_model_are_no_head():
    """DINOv3 calls its encoder the base model: a projection in its first layer passed for the first layer."""
    config = DINOv3ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model = DINOv3ViTModel(config)
    assert model.base_model is not model
    assert first_and_heads(model) == {"embeddings.patch_embeddings", "model.layer.1.mlp.down_proj"}


TOWER = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
TOWERS = {
    "text_config": dict(**TOWER, vocab_size=8, max_position_embeddings=4),
    "vision_config": dict(**TOWER, image_size=8, patch_size=4),
}


def upernet(classes: int = 5) -> nn.Module:
    stages = dict(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=[f"stage{k}" for k in range(1, 5)])
    config = UperNetConfig(
        backbone_config=ConvNextConfig(**stages),
        hidden_size=8,
        num_labels=classes,
        auxiliary_channels=8,
        auxiliary_in_channels=8,
    )
    return UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize(
    ("build", "edges"),
    [
        (upernet, {"backbone.embeddings.patch_embeddings", "decode_head.classifier", "auxiliary_head.classifier"}),
        (lambda: upernet(classes=8), {"backbone.embeddings.patch_embeddings", "auxiliary_head.classifier"}),
        (
            lambda: CLIPModel(CLIPConfig(projection_dim=8, **TOWERS)),
            {"vision_model.embeddings.patch_embedding", "visual_projection", "text_projection"},
        ),
        (
            lambda: SiglipModel(SiglipConfig(**TOWERS)),
            {"vision_model.embeddings.patch_embedding", "vision_model.head.mlp.fc2", "text_model.head"},
        ),
    ],
    ids=["segmentation", "as many classes as channels", "clip", "siglip"],
)
def test_heads_that_lie_with_the_body(build, edges):
    """The last layer of UperNet, an auxiliary head, passed for its head, and the first one of a text for the first of
    CLIP: the classifier and the patch embedding got the bits of the rest."""
    assert first_and_heads(build()) == edges


class HeadFirst(nn.Module):
    """A transformers-like model whose head is created, and listed, before its body."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    @property
    def base_model(self) -> nn.Module:
        return self.body


def test_the_head_is_what_is_outside_of_the_base_model_not_what_comes_last():
    assert first_and_heads(HeadFirst()) == {"body.0", "classifier"}


def test_first_and_last_bits():
    model = quantize(vit(), SAQQuantizationConfig(weight_bits=3, activation_bits=2, first_last_bits=6))
    found = bits(model)
    assert found.pop("vit.embeddings.patch_embeddings.projection") == (6, 6)
    assert found.pop("classifier") == (6, 6)
    assert set(found.values()) == {(3, 2)}
    like_the_rest = quantize(vit(), SAQQuantizationConfig(weight_bits=3, activation_bits=2, first_last_bits=None))
    assert set(bits(like_the_rest).values()) == {(3, 2)}


def test_first_and_last_bits_do_not_quantize_what_is_float():
    model = quantize(linear_net(), SAQQuantizationConfig(weight_bits=3, activation_bits=None))
    assert bits(model) == {"0": (8, None), "2": (3, None), "4": (8, None)}
    model = quantize(linear_net(), SAQQuantizationConfig(weight_bits=None, activation_bits=3))
    assert bits(model) == {"0": (None, 8), "2": (None, 3), "4": (None, 8)}


# Overrides and exclusions --------------------------------------------------------------------------------------------


def test_the_last_matching_override_wins():
    config = SAQQuantizationConfig(
        overrides={
            "vit.layers.*": {"weight_bits": 5, "activation_bits": 6},
            "*.fc1": {"weight_bits": 2},
            "vit.layers.1.mlp": {"weight_bits": 3, "quantizer": "pact"},
            "vit.layers.1.mlp.fc1": {"activation_bits": None},
            "classifier": {"weight_bits": 7},
        }
    )
    found = bits(quantize(vit(), config))
    assert found["vit.layers.0.attention.q_proj"] == (5, 6)
    assert found["vit.layers.0.mlp.fc1"] == (2, 6)
    assert found["vit.layers.0.mlp.fc2"] == (5, 6)
    assert found["vit.layers.1.mlp.fc1"] == (3, None)
    assert found["vit.layers.1.mlp.fc2"] == (3, 6)
    assert found["classifier"] == (7, 8)  # an override also beats first_last_bits, field by field
    turned = dict(reversed(config.overrides.items()))
    found = bits(quantize(vit(), SAQQuantizationConfig(overrides=turned)))
    assert found["vit.layers.0.mlp.fc1"] == (5, 6) and found["vit.layers.1.mlp.fc1"] == (5, 6)


def test_every_field_of_an_override_arrives():
    config = SAQQuantizationConfig(
        first_last_bits=None,
        overrides={
            "2": {
                "weight_bits": 3,
                "activation_bits": 5,
                "quantizer": "lsq_plus",
                "weight_granularity": "channel",
                "activation_mode": "affine",
                "scale_init": "mean",
            }
        },
    )
    model = quantize(linear_net(), config)
    weight, activation = model[2].weight_quantizer, model[2].activation_quantizer
    assert type(weight).__name__ == "LSQPlusQuantizer" and type(model[0].weight_quantizer).__name__ == "LSQQuantizer"
    assert weight.scale_shape == (8, 1) and model[0].weight_quantizer.scale_shape == (1,)
    assert (weight.bits, activation.bits, weight.scale_init) == (3, 5, "mean")
    assert activation.has_offset and not model[0].activation_quantizer.has_offset


def test_an_override_can_switch_quantization_on_and_off():
    config = SAQQuantizationConfig(
        weight_bits=None, activation_bits=None, overrides={"2": {"weight_bits": 3}, "4": {"weight_bits": None}}
    )
    model = quantize(linear_net(), config)
    assert bits(model) == {"2": (3, None)}
    assert [(layer.name, layer.reason) for layer in model.quantization_report.skipped] == [
        ("0", "bits are None"),
        ("4", "bits are None"),
    ]


def test_what_overrides_make_of_the_rest_is_checked_with_the_module_name():
    config = SAQQuantizationConfig(overrides={"2": {"activation_mode": "affine"}})
    with pytest.raises(ValueError, match=r"^2: activation_mode='affine' is not possible with quantizer='lsq'"):
        quantize(linear_net(), config)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("classifier", {"classifier"}),
        ("vit.layers.1.mlp", {"vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"}),
        ("*.fc1", {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}),
        ("vit.layers.?.mlp.fc[2]", {"vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"}),
    ],
    ids=["exact", "prefix", "glob", "glob with sets"],
)
def test_modules_to_not_convert(pattern: str, left: set[str]):
    model = quantize(vit(), SAQQuantizationConfig(modules_to_not_convert=[pattern]))
    skipped = model.quantization_report.skipped
    assert {layer.name for layer in skipped} == left
    assert {layer.reason for layer in skipped} == {"listed in modules_to_not_convert"}
    assert left.isdisjoint(layers(model)) and len(layers(model)) == 14 - len(left)


def test_a_prefix_ends_at_a_dot():
    model = nn.ModuleDict({"fc": nn.Linear(6, 6), "fc2": nn.Linear(6, 6)})
    quantize(model, SAQQuantizationConfig(modules_to_not_convert=["fc"]))
    assert list(layers(model)) == ["fc2"]


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"modules_to_not_convert": ["classifier", "clasifier"]}, "modules_to_not_convert: 'clasifier'"),
        ({"modules_to_not_convert": ["Classifier"]}, "modules_to_not_convert: 'Classifier'"),
        ({"overrides": {"*.fc3": {"weight_bits": 2}}}, r"overrides: '\*.fc3'"),
        ({"overrides": {"layers.7": {"weight_bits": 2}}}, "overrides: 'layers.7'"),
    ],
    ids=["name", "case", "glob", "prefix"],
)
def test_a_pattern_that_matches_nothing_raises(fields, start: str):
    model = vit()
    message = rf"^{start} matches no module of the model\. Expected a dotted module name, .* has for example \['vit',"
    with pytest.raises(ValueError, match=message):
        quantize(model, SAQQuantizationConfig(**fields))
    assert not layers(model)


def test_a_plan_changes_nothing():
    model = linear_net()
    assert {layer.name: layer.settings["weight_bits"] for layer in plan(model, W4A4).layers} == {
        "0": 8,
        "2": 4,
        "4": 8,
    }
    assert not layers(model)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (
            nn.Sequential(nn.ReLU()),
            "Sequential: no layer can be quantized. Expected at least one of ['Linear', 'Conv1d', 'Conv2d']; found "
            "none of them.",
        ),
        (nn.Sequential(nn.Conv3d(1, 1, 1)), "found 0 (this convolution has no quantized form)."),
        (nn.Linear(2, 2), "found Linear (the model itself is a single layer; wrap it, for example in nn.Sequential)."),
    ],
    ids=["no layers", "unsupported layers", "a bare layer"],
)
def test_a_model_without_quantizable_layers_raises(model: nn.Module, found: str):
    with pytest.raises(ValueError) as error:
        quantize(model, W4A4)
    assert str(error.value).endswith(found)
    quantize(model, FLOAT)  # asks for nothing, so that nothing is missing


def test_leaving_out_everything_raises():
    with pytest.raises(
        ValueError, match=r"no layer can be quantized.*; found 0 \(listed in modules_to_not_convert\),"
    ):
        quantize(linear_net(), SAQQuantizationConfig(modules_to_not_convert=["*"]))

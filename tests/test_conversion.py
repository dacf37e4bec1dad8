"""Which layers are replaced, what they share with the old ones, and what they compute."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from tiny_models import (
    NUM_LABELS,
    TRANSFORMERS_MODELS,
    conv_net,
    convnext,
    deit_with_teacher,
    digit_classifier,
    images,
    jitter,
    linear_net,
    mobilenet_v2,
    resnet,
    seeded,
    vectors,
    vit,
)
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.conversion.planning import plan
from hf_saq.conversion.structure import first_and_heads
from hf_saq.layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear

FLOAT = SAQQuantizationConfig(weight_bits=None, activation_bits=None)
W4A4 = SAQQuantizationConfig()
every_family = pytest.mark.parametrize("build", TRANSFORMERS_MODELS.values(), ids=TRANSFORMERS_MODELS)


def layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def bits(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """`(weight bits, activation bits)` of each quantized layer, as built."""
    return {
        name: tuple(q and q.bits for q in (layer.weight_quantizer, layer.activation_quantizer))
        for name, layer in layers(model).items()
    }


# Which layers ------------------------------------------------------------------------------------------------------


@every_family
def test_every_linear_and_convolution_is_replaced(build):
    model = build()
    float_types = {name: type(m) for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    others = {name: m for name, m in model.named_modules() if type(m) not in (nn.Linear, nn.Conv2d)}
    assert quantize(model, W4A4) is model
    quantized_types = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}
    assert {name: type(m) for name, m in layers(model).items()} == {
        name: quantized_types[float_type] for name, float_type in float_types.items()
    }
    modules = dict(model.named_modules())
    assert all(modules[name] is module for name, module in others.items())


@every_family
def test_parameters_are_the_same_objects(build):
    model = build()
    before = dict(model.named_parameters())
    quantize(model, W4A4)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.split(".")[-2] for name in after.keys() - before.keys()} == {
        "weight_quantizer",
        "activation_quantizer",
    }


def test_hyperparameters_mode_and_frozen_parameters_are_kept():
    with seeded(0):
        conv = nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False, padding_mode="reflect")
        model = nn.Sequential(conv, nn.Conv1d(8, 4, 3, padding="same"), nn.Linear(4, 5))
    conv.weight.requires_grad_(False)
    model.train()
    conv.eval()
    quantize(model, W4A4)
    assert [type(m) for m in model] == [QuantConv2d, QuantConv1d, QuantLinear]
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels"):
        assert getattr(model[0], name) == getattr(conv, name), name
    assert model[0].bias is None and not model[0].weight.requires_grad and not model[0].training
    assert model[1].padding == "same" and model[1].training
    assert (model[2].in_features, model[2].out_features) == (4, 5) and model[2].bias is not None


def test_hooks_of_the_float_layer_run_on_and_can_be_removed():
    model = linear_net()
    seen: list[Tensor] = []
    handle = model[2].register_forward_hook(lambda module, args, output: seen.append(output))
    calibrate(quantize(model, W4A4), [vectors()])
    assert len(seen) == 1 and seen[0].shape == (8, 8)
    handle.remove()
    model(vectors())
    assert len(seen) == 1


class Shared(nn.Module):
    """One module under two names, one weight under two modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = nn.ModuleList([self.first])
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tied(self.again[0](self.first(x))))


def test_shared_modules_and_tied_weights_stay_shared():
    model = quantize(Shared(), W4A4)
    assert model.first is model.again[0] and type(model.first) is QuantLinear
    assert model.tied.weight is model.first.weight
    assert model.tied.weight_quantizer is not model.first.weight_quantizer
    assert [layer.name for layer in model.quantization_report.converted] == ["first", "tied", "head"]
    calibrate(model, [vectors()])
    packed = pack(model)
    assert packed.first is packed.again[0]
    assert_close(packed(vectors()), model.eval()(vectors()), rtol=0, atol=0)


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


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_conv1d_of_transformers_equals_the_float_one_on_hand_quantized_operands(granularity: str):
    layer = jitter(Conv1D(5, 6))
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    config = SAQQuantizationConfig(weight_bits=3, first_last_bits=None, weight_granularity=granularity)
    model = calibrate(quantize(nn.Sequential(copy.deepcopy(layer)), config), [x])
    w_scale, x_scale = model[0].weight_quantizer.scale.detach(), model[0].activation_quantizer.scale.detach()
    assert w_scale.shape == ((1,) if granularity == "tensor" else (1, 5))
    layer.weight.data = by_hand(layer.weight.data, w_scale, -4, 3)
    expected = layer(by_hand(x, x_scale, -8, 7))
    assert_close(model(x), expected)
    assert torch.equal(pack(model)(x), model(x))


@pytest.mark.parametrize("size", [8, 9, 11], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, (4, 5)], ids=str)
def test_the_same_padding_of_timm_equals_the_float_one_on_hand_quantized_operands(size: int, stride: int, kernel):
    layer = jitter(Conv2dSame(4, 6, kernel, stride=stride, dilation=2, groups=2))
    x = torch.randn(2, 4, size, size + 1, generator=torch.Generator().manual_seed(0))
    config = SAQQuantizationConfig(weight_bits=3, first_last_bits=None)
    model = calibrate(quantize(nn.Sequential(copy.deepcopy(layer)), config), [x])
    layer.weight.data = by_hand(layer.weight.data, model[0].weight_quantizer.scale.detach(), -4, 3)
    expected = layer(by_hand(x, model[0].activation_quantizer.scale.detach(), -8, 7))
    assert torch.equal(model(x), expected)
    assert torch.equal(pack(model)(x), expected)


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
        ({"overrides": {"layers.0": {"weight_bits": 2}}}, "overrides: 'layers.0'"),
    ],
    ids=["name", "case", "glob", "prefix"],
)
def test_a_pattern_that_matches_nothing_raises(fields, start: str):
    model = vit()
    message = rf"^{start} matches no module of the model\. Expected a dotted module name, .* has for example \['vit',"
    with pytest.raises(ValueError, match=message):
        quantize(model, SAQQuantizationConfig(**fields))
    assert not layers(model)


# What must hold ------------------------------------------------------------------------------------------------------


@every_family
def test_bits_none_change_nothing(build):
    model, twin = build().train(), build().train()
    quantize(model, FLOAT)
    assert not hasattr(model.config, "quantization_config")
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    losses = []
    for m in (model, twin):
        torch.manual_seed(0)
        out = m(images(), labels=torch.tensor([0, 1, 2, 0]))
        out.loss.backward()
        losses.append(out.loss)
    assert torch.equal(*losses)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    assert "0 layers quantized" in str(model.quantization_report)


def distance(logits: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to how much the logits vary from image to image."""
    return ((logits - expected).square().mean().sqrt() / (expected - expected.mean(0)).std()).item()


def agreement(logits: Tensor, expected: Tensor) -> float:
    return (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()


@pytest.mark.parametrize("family", ["vit", "resnet"])
@torch.no_grad()
def test_at_8_bits_a_trained_model_predicts_the_same(family):
    """Measured on 597 held-out digits: at 8 bits 99.7 % of the predictions agree, the distance is 1.5 to 2 %."""
    model, x, y = digit_classifier(family)
    expected = model(x).logits
    assert agreement(expected, nn.functional.one_hot(y)) > 0.75
    config = SAQQuantizationConfig(weight_bits=8, activation_bits=8)
    logits = calibrate(quantize(copy.deepcopy(model), config), [x[:64]])(x).logits
    assert not torch.equal(logits, expected)
    assert agreement(logits, expected) >= 0.985
    assert distance(logits, expected) < 0.04


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("build", [vit, convnext, resnet], ids=["vit", "convnext", "resnet"])
@torch.no_grad()
def test_at_8_bits_an_untrained_model_is_close(build, granularity: str):
    """Measured: distance 3 to 7 %, 63 or 64 of 64 predictions agree. A random MobileNetV2 this narrow amplifies any
    noise in its 52 layers, so that it says nothing."""
    x = images(64)
    expected = build()(x).logits
    config = SAQQuantizationConfig(weight_bits=8, activation_bits=8, weight_granularity=granularity)
    logits = calibrate(quantize(build(), config), [x[:32]])(x).logits
    assert not torch.equal(logits, expected)
    assert distance(logits, expected) < 0.1
    assert agreement(logits, expected) >= 61 / 64


def test_fewer_bits_are_worse():
    x = vectors(64)
    expected = linear_net()(x)
    errors = []
    for n in (2, 3, 4, 6, 8):
        config = SAQQuantizationConfig(weight_bits=n, activation_bits=n, first_last_bits=None)
        errors.append((calibrate(quantize(linear_net(), config), [x])(x) - expected).pow(2).mean().item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "no bias": nn.Conv2d(4, 6, 3, bias=False),
    "stride": nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise multiplier": nn.Conv2d(4, 8, 3, groups=4),
    "dilation": nn.Conv2d(4, 6, 3, dilation=(2, 1)),
    "same": nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2),
    "pointwise": nn.Conv2d(4, 6, 1),
    **{mode: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode) for mode in ("reflect", "replicate", "circular")},
    "1d": nn.Conv1d(4, 6, 3, padding=1, groups=2),
    "1d circular": nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", dilation=2),
}


def by_hand(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return (x / scale).round().clamp(qmin, qmax) * scale


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_equals_the_float_one_on_hand_quantized_operands(name: str, granularity: str):
    layer = jitter(copy.deepcopy(CONVOLUTIONS[name]))
    shape = (2, 4, 9) if isinstance(layer, nn.Conv1d) else (2, 4, 9, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    config = SAQQuantizationConfig(
        weight_bits=3, activation_bits=4, first_last_bits=None, weight_granularity=granularity
    )
    model = calibrate(quantize(nn.Sequential(copy.deepcopy(layer)), config), [x])
    w_scale, x_scale = model[0].weight_quantizer.scale.detach(), model[0].activation_quantizer.scale.detach()
    assert w_scale.numel() == (1 if granularity == "tensor" else layer.out_channels)
    layer.weight.data = by_hand(layer.weight.data, w_scale, -4, 3)
    expected = layer(by_hand(x, x_scale, -8, 7))
    assert torch.equal(model(x), expected)
    assert torch.equal(pack(model)(x), expected)


def test_a_linear_layer_equals_the_float_one_on_hand_quantized_operands():
    layer = jitter(nn.Linear(6, 5))
    x = torch.randn(2, 7, 6).abs()
    config = SAQQuantizationConfig(weight_bits=2, activation_bits=5, first_last_bits=None)
    model = calibrate(quantize(nn.Sequential(copy.deepcopy(layer)), config), [x])
    layer.weight.data = by_hand(layer.weight.data, model[0].weight_quantizer.scale.detach(), -2, 1)
    expected = layer(by_hand(x, model[0].activation_quantizer.scale.detach(), 0, 31))
    assert torch.equal(model(x), expected)


def test_gradients_reach_the_latent_weight_and_every_learned_value():
    model = calibrate(quantize(conv_net(), W4A4), [images(size=8)])
    model.train()(images(size=8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# The report, and what quantize refuses -------------------------------------------------------------------------------


def test_the_report_as_text():
    config = SAQQuantizationConfig(weight_bits=3, activation_bits=None, modules_to_not_convert=["2"])
    model = quantize(linear_net(), config)
    assert str(model.quantization_report).splitlines() == [
        "module  type    W      A      sign of A  quantizer  note",
        "0       Linear  8      float  -          lsq        first layer or head",
        "2       Linear  float  float  -          -          listed in modules_to_not_convert",
        "4       Linear  8      float  -          lsq        first layer or head",
        "2 layers quantized, 1 left in float",
    ]


def test_the_report_says_which_signs_calibration_found():
    overrides = {"2": {"activation_mode": "signed"}, "4": {"quantizer": "lsq_plus"}}
    net = nn.Sequential(*linear_net(), nn.ReLU(), nn.Linear(3, 3))
    model = quantize(net, W4A4.replace(overrides=overrides))
    assert [layer.sign for layer in model.quantization_report.layers] == ["auto", "signed", "affine", "auto"]
    calibrate(model, [vectors()])
    assert [layer.sign for layer in model.quantization_report.layers] == ["signed", "signed", "affine", "unsigned"]


def test_a_plan_changes_nothing():
    model = linear_net()
    assert {layer.name: layer.settings["weight_bits"] for layer in plan(model, W4A4)} == {"0": 8, "2": 4, "4": 8}
    assert not layers(model)


def test_the_configuration_is_kept_by_transformers_models_only():
    assert quantize(vit(), W4A4).config.quantization_config is W4A4
    assert not hasattr(quantize(linear_net(), W4A4), "config")
    model = linear_net()
    model.config = {"width": 8}  # type: ignore[assignment]
    assert quantize(model, W4A4).config == {"width": 8}


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


def test_quantizing_twice_raises_and_changes_nothing():
    model = calibrate(quantize(linear_net(), W4A4), [vectors()]).eval()
    expected = model(vectors())
    for again in (model, pack(model), nn.Sequential(model)):
        with pytest.raises(ValueError, match="^Sequential has quantized layers already; start from the float model"):
            quantize(again, W4A4)
        assert torch.equal(again(vectors()), expected)


@pytest.mark.parametrize("config", [SAQConfig(), None, {"weight_bits": 4}], ids=["SAQConfig", "None", "dict"])
def test_another_kind_of_configuration_raises(config):
    with pytest.raises(TypeError, match=f"^config is a {type(config).__name__}; expected a SAQQuantizationConfig"):
        quantize(linear_net(), config)


def test_quantizers_know_their_path():
    model = quantize(resnet(), W4A4)
    for name, layer in layers(model).items():
        assert layer.weight_quantizer.path == f"{name}.weight_quantizer"
        assert layer.activation_quantizer.path == f"{name}.activation_quantizer"
    assert model.config.num_labels == NUM_LABELS


def test_a_scale_too_coarse_for_many_channels_is_told():
    """Eight channels a thousand times smaller than the other eight: nothing is left of them at 4 bits per tensor."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 16, 3), nn.Conv2d(16, 2, 1))
    with torch.no_grad():
        model[1].weight[8:] *= 1e-3
    per_channel = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"in 1 layers: 1 \(8 of 16\).*weight_granularity='channel'"):
        quantize(model, SAQQuantizationConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(per_channel, SAQQuantizationConfig(weight_granularity="channel"))

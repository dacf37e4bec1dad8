"""Layers are replaced by quantized ones: what the two share, and what the quantized ones compute."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from quantized_models import layers
from timm.layers import Conv2dSame
from tiny_models import (
    NUM_LABELS,
    TRANSFORMERS_MODELS,
    conv_net,
    images,
    jitter,
    linear_net,
    resnet,
    seeded,
    vectors,
    vit,
)
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.layers import QuantConv1d, QuantConv2d, QuantLinear

FLOAT = SAQQuantizationConfig(weight_bits=None, activation_bits=None)
W4A4 = SAQQuantizationConfig()
every_family = pytest.mark.parametrize("build", TRANSFORMERS_MODELS.values(), ids=TRANSFORMERS_MODELS)


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


def test_the_configuration_is_kept_by_transformers_models_only():
    edges = ["vit.embeddings.patch_embeddings.projection", "classifier"]
    assert quantize(vit(), W4A4).config.quantization_config == W4A4.replace(first_last_modules=edges)
    assert W4A4.first_last_modules is None  # one configuration serves many models
    assert not hasattr(quantize(linear_net(), W4A4), "config")
    model = linear_net()
    model.config = {"width": 8}  # type: ignore[assignment]
    assert quantize(model, W4A4).config == {"width": 8}


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


def test_a_model_that_is_wrapped_by_ddp_is_refused():
    """A user wraps the model, trains it in float, and quantizes what is inside: its scales were not averaged."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # without processes
    wrapped.module = linear_net()
    with pytest.raises(
        ValueError, match="wrapped by DistributedDataParallel.*Quantize `model.module`, and wrap it anew"
    ):
        quantize(wrapped, W4A4)
    assert not any(isinstance(module, QuantLinear) for module in wrapped.modules())


@pytest.mark.parametrize("mistake", ["output_attentions", "NaN", "a warning as an error"])
def test_a_model_that_is_refused_is_as_it_was(mistake):
    """A user corrects what the message says and calls `quantize` again, in the same session."""
    model, config = vit(), W4A4.replace(quantize_attention=True)
    model.set_attn_implementation("flex_attention" if mistake == "a warning as an error" else "eager")
    head = model.classifier.weight
    if mistake == "output_attentions":
        model.config.output_attentions = True
    if mistake == "NaN":
        head.data[0, 0] = torch.nan
    implementation = model.config._attn_implementation
    before = [(name, type(module), id(module)) for name, module in model.named_modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, UserWarning), match="output_attentions|NaN values|is replaced by 'saq'"):
            quantize(model, config)
    assert [(name, type(module), id(module)) for name, module in model.named_modules()] == before
    assert model.state_dict().keys() == values.keys() and model.config._attn_implementation == implementation
    assert not hasattr(model, "quantization_report") and not hasattr(model, "hf_quantizer")
    model.config.output_attentions = False
    head.data[0, 0] = 0.5
    model.set_attn_implementation("eager")
    assert calibrate(quantize(model, config), [images()])(images()).logits.isfinite().all()

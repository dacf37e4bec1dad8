"""Users load weights into models that are quantized already: the quantizers never stay those of other weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from matrices import matrix
from tiny_models import images, resnet, vit
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.quantizers import QUANTIZERS, Quantizer


def quantized(model: nn.Module, quantizer: str = "lsq", granularity="tensor") -> nn.Module:
    fields = {"weight_bits": 8, "activation_bits": 8, "weight_granularity": granularity}
    return quantize(model, SAQQuantizationConfig(quantizer=quantizer, **fields)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images(4)).logits


@matrix(
    4,
    quantizer=sorted(QUANTIZERS),
    build={"vit": vit, "resnet": resnet},
    granularity=["tensor", "channel"],
    assign={"copied": False, "assigned": True},
)
def test_float_weights_loaded_after_quantize_are_fitted_anew(quantizer: str, build, granularity: str, assign: bool):
    """A user quantizes a fresh model and loads float weights with `strict=False`: as if quantized after loading."""
    source = build(seed=1).eval()
    expected = calibrate(quantized(copy.deepcopy(source), quantizer, granularity), [images(4)])
    model = quantized(build(seed=0), quantizer, granularity)
    model.load_state_dict({name: value.clone() for name, value in source.state_dict().items()}, False, assign)
    calibrate(model, [images(4)])
    assert torch.equal(logits(model), logits(expected))
    error = (logits(model) - logits(source)).norm() / logits(source).norm()
    assert error < 0.06


def test_activations_calibrated_on_other_weights_are_not_kept():
    """A user loads float weights into a calibrated model: it stops until it is calibrated on them."""
    model = calibrate(quantized(vit(seed=0)), [images(4)])
    model.load_state_dict(vit(seed=1).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="activation_quantizer: this activation quantizer has no range yet"):
        model(images(4))


def test_one_layer_loaded_alone_leaves_the_others_as_they_are():
    """A user loads a head trained elsewhere: that layer is fitted anew, no other value moves."""
    model = calibrate(quantized(vit(seed=0)), [images(4)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = {name: v for name, v in vit(seed=1).state_dict().items() if name.startswith("classifier.")}
    model.load_state_dict(head, strict=False)
    assert not model.classifier.activation_quantizer.initialized
    assert not torch.equal(model.classifier.weight_quantizer.scale, before["classifier.weight_quantizer.scale"])
    for name, value in model.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(value, before[name]), name


@pytest.mark.parametrize("order", ["weights first", "quantizers first", "one by one", "backwards one by one"])
def test_a_checkpoint_loaded_in_parts_is_complete(order: str):
    """A user loads a quantized checkpoint shard by shard, in any order: nothing of it is fitted anew."""
    source = calibrate(quantized(vit(seed=1)), [images(4)])
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, Quantizer):
                module.scale.mul_(0.8)
    state = source.state_dict()
    parts = [{n: v for n, v in state.items() if ("_quantizer." in n) == second} for second in (False, True)]
    if "one by one" in order:
        parts = [{name: value} for name, value in state.items()]
    model = calibrate(quantized(vit(seed=0)), [images(4)])
    for part in parts[::-1] if order in ("quantizers first", "backwards one by one") else parts:
        model.load_state_dict(part, strict=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(source))


def test_parameters_without_buffers_keep_their_scales():
    """A user loads `dict(named_parameters())`, scales among them but no buffer: they are taken as they are."""
    source = calibrate(quantized(vit(seed=1)), [images(4)])
    model = calibrate(quantized(vit(seed=0)), [images(4)])
    model.load_state_dict(dict(source.named_parameters()), strict=False)
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("through", ["memory", "file"])
def test_values_of_other_bits_are_refused(through: str):
    """A user goes from 8 to 4 bits by load_state_dict, or has forgotten the bits: steps were 16 times too small."""
    source = calibrate(quantized(resnet(seed=1)), [images(4)])
    state = source.state_dict()
    if through == "file":
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    model = quantize(resnet(seed=1), SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    with pytest.raises(RuntimeError, match=r"quantizer: its values are those of 8 bits, and this model has 4"):
        model.load_state_dict(state)
    quantized(resnet(seed=0)).load_state_dict(state)
    weights = {name: value for name, value in state.items() if "_quantizer." not in name}  # as the message says
    model.load_state_dict(weights, strict=False)
    expected = quantize(resnet(seed=1), SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    assert torch.equal(logits(calibrate(model.eval(), [images(4)])), logits(calibrate(expected.eval(), [images(4)])))


def test_the_values_of_a_head_without_its_weight_are_told_of():
    """A user drops `weight` and `bias` of the head from a checkpoint, for other classes: it kept the old scales."""
    source = calibrate(quantized(vit(seed=1)), [images(4)])
    state = source.state_dict()
    del state["classifier.weight"], state["classifier.bias"]
    model = quantized(vit(seed=0))
    model.load_state_dict(state, strict=False)
    with pytest.warns(
        UserWarning, match=r"^classifier: the values of its quantizers were loaded and its weight was not"
    ):
        model(images(2))
    model(images(2))  # said once
    for name in [name for name in state if name.startswith("classifier.")]:
        del state[name]
    model.load_state_dict(state, strict=False)
    model(images(2))  # a head that is left out altogether is nothing to be told of


@pytest.mark.parametrize("quantizer", ["lsq", "liq"])
def test_reset_parameters_resets_quantizers(quantizer: str):
    """A user resets all layers before each fold of a cross-validation: scales stayed those of the fold before."""
    model = calibrate(quantized(resnet(seed=0), quantizer), [images(4)])
    with torch.no_grad():
        for module in model.modules():
            for p in module.parameters(recurse=False) if isinstance(module, Quantizer) else ():
                p.mul_(7)
    torch.manual_seed(3)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with pytest.raises(RuntimeError, match="activation_quantizer: this activation quantizer has no range yet"):
        model(images(4))
    expected = resnet(seed=0)
    torch.manual_seed(3)
    for module in expected.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    expected = calibrate(quantized(expected, quantizer), [images(4)])
    assert torch.equal(logits(calibrate(model, [images(4)])), logits(expected))

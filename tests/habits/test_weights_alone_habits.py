"""Users load weights into models that are quantized already: the quantizers never stay those of other weights."""

from __future__ import annotations

import copy

import pytest
import torch
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


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("build", [vit, resnet])
@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
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

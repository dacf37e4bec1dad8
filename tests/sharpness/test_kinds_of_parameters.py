"""Which parameters are those of norms, by the names that timm and transformers give them."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from tiny_models import resnet, swin, vit
from torch import nn
from transformers import BitConfig, BitForImageClassification

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, quantize
from hf_saq.sharpness import kinds_of_parameters
from hf_saq.training import parameter_groups


def bit() -> nn.Module:
    return BitForImageClassification(BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2))


MODELS = {
    "efficientnet": (lambda: timm.create_model("test_efficientnet"), r"bn\d\.weight$"),  # norm and activation in one
    "resnet of timm": (lambda: timm.create_model("test_resnet"), r"(bn\d|conv1\.\d|downsample\.[12])\.weight$"),
    "byobnet": (lambda: timm.create_model("test_byobnet"), r"bn\.weight$"),
    "convnext": (lambda: timm.create_model("test_convnext"), r"(norm|stem\.1|downsample\.0)\.weight$"),
    "bit": (bit, r"norm\d?\.weight$"),
    "vit": (vit, r"(layernorm|layernorm_before|layernorm_after)\.weight$"),
    "resnet": (resnet, r"normalization\.weight$"),
    "swin": (swin, r"(norm|layernorm_before|layernorm_after|layernorm)\.weight$"),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_norms(name):
    build, pattern = MODELS[name]
    model = build()
    kinds = kinds_of_parameters(model)
    vectors = {n: p for n, p in model.named_parameters() if p.ndim == 1 and n.endswith(".weight")}
    expected = {n for n in vectors if re.search(pattern, n)}
    assert expected == {n for n in vectors if kinds[vectors[n]] == "norm"} and len(expected) > 2
    assert not [n for n, p in model.named_parameters() if p.ndim > 1 and kinds[p] == "norm"]


def test_norms_that_hold_an_activation_are_perturbed_and_do_not_decay():
    model = quantize(timm.create_model("test_efficientnet"), SAQQuantizationConfig(activation_bits=None))
    gammas = {p for n, p in model.named_parameters() if re.search(r"bn\d\.weight$", n)}
    decays, *others = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert decays["weight_decay"] == 0.1 and gammas.isdisjoint(decays["params"])
    assert gammas <= {p for group in others for p in group["params"]}
    minimizer = SharpnessAwareMinimizer(model, rho=0.1, perturb=["norm"])
    before = {p: p.detach().clone() for p in gammas}
    with minimizer.ascent():
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    with minimizer.perturbed():
        assert all(not torch.equal(p, before[p]) for p in gammas)


def test_what_holds_layers_is_no_norm():
    class BlockWithNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.layer_scale = nn.Parameter(torch.ones(4))

    model = BlockWithNorm()
    kinds = kinds_of_parameters(model)
    assert kinds[model.layer_scale] == "other" and kinds[model.norm.weight] == "norm"

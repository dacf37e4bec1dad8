"""Settings that would have no effect on the model at hand are refused."""

from __future__ import annotations

import pytest
from quantized_models import layers
from tiny_models import linear_net, vectors, vit
from torch import nn

from hf_saq import SAQQuantizationConfig, quantize
from hf_saq.conversion.planning import plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overrides": {"*.mlp": {"weight_bits": 8}}}, r"overrides: '\*.mlp' matches vit.layers.0.mlp, .*fc1: a glob"),
        ({"modules_to_not_convert": ["*.attention"]}, r"_convert: '\*.attention' .* Expected '\*.attention.\*'"),
        ({"first_last_modules": ["*.mlp"]}, r"first_last_modules: '\*.mlp' matches vit.layers.0.mlp, and none of"),
        ({"overrides": {"*norm_after": {"weight_bits": 8}}}, r"norm_after, which is no layer that can be quantized"),
    ],
    ids=["overrides", "exclusion", "first and last", "a norm"],
)
def test_a_pattern_that_means_modules_and_none_of_their_layers_raises(fields, message: str):
    """The name of a module means what is inside of it; a glob for such a name does not, and had no effect."""
    with pytest.raises(ValueError, match=message):
        plan(vit(), SAQQuantizationConfig(**fields))
    kept = ["*norm_after", "vit.layers.0.mlp", "vit.layers.?.mlp.*"]
    plan(vit(), SAQQuantizationConfig(modules_to_not_convert=kept))


def test_fields_that_are_set_one_by_one_are_checked():
    """A misspelt field of an override was ignored, and any other granularity was one scale per tensor."""
    for name, value in (("weight_granularity", "channels"), ("overrides", {"2": {"weights_bits": 8}})):
        config = SAQQuantizationConfig()
        setattr(config, name, value)
        model = linear_net()
        with pytest.raises(ValueError, match=rf"SAQQuantizationConfig.{name}.*channels|{name}.*weights_bits"):
            quantize(model, config)
        assert not layers(model)


def test_lazy_layers_are_refused():
    """They stayed in float: what they will be is not known before a batch was seen."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^Sequential: 1.weight has no shape yet, .* Run one through it before"):
        quantize(model, SAQQuantizationConfig())
    model(vectors())
    assert len(layers(quantize(model, SAQQuantizationConfig()))) == 2

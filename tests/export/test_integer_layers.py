"""Integer layers compute what the quantized ones do, from codes: every quantizer, on every family of models.

The references are the quantized models themselves, in float64 where a tolerance is to be tight: a rounding that flips
is a whole step, so both sides are compared on the same side of it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import matrix
from quantized_models import codes, quantized
from tiny_models import (
    conv_net,
    convnext,
    deit_with_teacher,
    images,
    linear_net,
    mobilenet_v2,
    resnet,
    swin,
    timm_efficientnet,
    vectors,
    vit,
)
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.export.integer_copy import integer_copy
from hf_saq.export.integer_layers import IntegerLayer
from hf_saq.export.operators import quantize_dequantize
from hf_saq.export.stored_grids import ActivationGrid, WeightGrid
from hf_saq.layers import QuantizedLayer
from hf_saq.outputs import logits_of
from hf_saq.quantizers import QUANTIZERS, QuantizerSettings

MODELS = {
    "vit": vit,
    "deit": deit_with_teacher,
    "swin": swin,
    "convnext": convnext,
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet": timm_efficientnet,
    "conv_net": conv_net,
    "linear_net": linear_net,
}
HAVE_PRODUCTS = {"vit", "deit", "swin"}


def inputs_of(name: str) -> torch.Tensor:
    return {"conv_net": images(4, 8), "linear_net": vectors(), "efficientnet": images(2, 32)}.get(name, images())


@matrix(
    6,
    name=list(MODELS),
    kind=list(QUANTIZERS),
    granularity=("tensor", "channel"),
    weights=("int8", "int4"),
)
def test_a_model_of_integer_layers_predicts_the_same(name: str, kind: str, granularity: str, weights: str):
    x = inputs_of(name)
    fields = {"quantize_attention": True} if name in HAVE_PRODUCTS else {}
    model = quantized(MODELS[name], x=x, quantizer=kind, weight_granularity=granularity, **fields)
    # Compute in float64: in float32 a sum in another order can tip a value that lies half-way between two codes, on
    # some CPUs and not on others.
    copies = [integer_copy(form, weights).double() for form in (model, pack(model))]
    with torch.no_grad():
        expected = logits_of(model.double()(x.double()))
        for copy in copies:
            torch.testing.assert_close(logits_of(copy(x.double())), expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_grid_of_a_weight_is_the_same_numbers(kind: str, bits: int, weights: str):
    model = quantized(linear_net, vectors(), quantizer=kind, weight_bits=bits, weight_granularity="channel")
    layer = model[2]
    grid = WeightGrid.of(layer, "2", weights)
    with torch.no_grad():
        expected = layer.quantized_weight().double()
    # One rounding of float32 for the product, one for the sum.
    torch.testing.assert_close(grid.values(), expected, rtol=2e-7, atol=2e-7 * expected.abs().max().item())
    assert grid.codes.dtype == torch.int8
    assert grid.fits("int4") or bits > 4 or weights == "int8"
    own = codes(model)["2"]
    odd = kind in ("dorefa", "pact") and grid.offset is None
    assert torch.equal(grid.codes, (2 * own + 1 if odd else own).to(torch.int8))
    assert odd == (kind in ("dorefa", "pact") and bits <= (7 if weights == "int8" or bits > 4 else 3))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", ["signed", "unsigned", "affine"])
def test_activations_are_the_same_numbers(bits: int, mode: str):
    """Against the formula in numpy, ties and values out of range among them."""
    signed = {"signed": True, "unsigned": False, "affine": None}[mode]
    quantizer = QUANTIZERS["lsq_plus"](QuantizerSettings(bits=bits, role="activation", signed=signed))
    quantizer.initialize(torch.linspace(-1, 3, 1001))
    grid = ActivationGrid.of(quantizer)
    assert grid.high == 2**bits - 1 and (grid.offset is None) == (mode != "affine")
    offset = torch.tensor(0.0) if grid.offset is None else grid.offset
    x = torch.cat([torch.linspace(-9, 9, 2001), (torch.arange(-300, 300) + 0.5) * grid.scale + offset])
    found = (
        quantize_dequantize(x - offset, grid.scale, torch.tensor(grid.zero_point, dtype=torch.uint8), grid.high)
        + offset
    )
    low = -(2 ** (bits - 1)) if mode == "signed" else 0
    v = (x.numpy() - offset.numpy()) / grid.scale.numpy()
    expected = np.clip(np.rint(v), low, low + 2**bits - 1).astype(np.float32) * grid.scale.numpy() + offset.numpy()
    assert np.array_equal(found.numpy(), expected)
    with torch.no_grad():
        assert torch.equal(quantizer(x), torch.from_numpy(expected))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["liq", "lsq_plus"])
def test_offsets_are_terms_of_their_own_in_convolutions(kind: str, groups: int, padding_mode: str):
    convolution = nn.Conv2d(4, 8, 3, padding=2, stride=2, groups=groups, padding_mode=padding_mode)
    x = images(2, 9)[:, :1].repeat(1, 4, 1, 1) + 1
    model = calibrate(
        quantize(nn.Sequential(convolution), SAQQuantizationConfig(quantizer=kind, weight_granularity="channel")), [x]
    ).eval()
    copied = integer_copy(model, "int8")
    layer = copied[0]
    assert isinstance(layer, IntegerLayer)
    assert (layer.weight_offset is not None) == (kind == "liq")
    assert (layer.border_weight is not None) == (kind == "lsq_plus" and padding_mode == "zeros")
    with torch.no_grad():
        torch.testing.assert_close(copied(x), model(x), atol=2e-5, rtol=2e-6)


def test_weights_or_inputs_alone():
    for fields in ({"weight_bits": None}, {"activation_bits": None}):
        model = quantized(linear_net, vectors(), first_last_bits=None, quantizer="liq", **fields)
        with torch.no_grad():
            torch.testing.assert_close(integer_copy(model, "int8")(vectors()), model(vectors()), atol=1e-6, rtol=1e-6)


def test_the_model_is_left_as_it_is():
    model = quantized(vit)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = integer_copy(model, "int8")
    assert model.config._attn_implementation == "sdpa" and copied.config._attn_implementation == "eager"
    assert not any(isinstance(module, QuantizedLayer) for module in copied.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

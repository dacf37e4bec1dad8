"""Weights that start at zero: last layers of residual branches, heads, second factors of low-rank adapters."""

from __future__ import annotations

import pytest
import torch
from test_dorefa import dorefa_weight
from torch import Tensor
from torch.testing import assert_close

from hf_saq.layers import PackedLayer, QuantLinear
from hf_saq.quantizers import QUANTIZERS, DoReFaQuantizer, Quantizer, QuantizerSettings, quantizer_class

SHAPES = {"tensor": (1,), "channel": (6, 1)}
every_granularity = pytest.mark.parametrize("granularity", SHAPES)
every_bits = pytest.mark.parametrize("bits", [2, 4, 8], ids=lambda b: f"{b}bit")


def fitted_to_zeros(name: str, bits: int, granularity: str) -> Quantizer:
    quantizer = quantizer_class(name)(QuantizerSettings(bits, "weight", scale_shape=SHAPES[granularity]))
    quantizer.initialize(torch.zeros(6, 40))
    return quantizer


def randn(seed: int) -> Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@every_bits
@every_granularity
def test_they_learn(name: str, bits: int, granularity: str):
    """Ranges learn at a tenth of the rate, as in training. In as many steps a float weight is there; a quantizer whose
    range holds its weight back gets a tenth of the way."""
    quantizer = fitted_to_zeros(name, bits, granularity)
    w, target = torch.zeros(6, 40, requires_grad=True), 0.1 * randn(1)
    groups = [{"params": [w], "lr": 0.01}, {"params": list(quantizer.parameters()), "lr": 0.001}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(w) - target).square().sum().backward()
        optimizer.step()
    on_target = quantizer_class(name)(QuantizerSettings(bits, "weight", scale_shape=SHAPES[granularity]))
    on_target.initialize(target)
    error, best = (quantizer(w) - target).norm(), (on_target(target) - target).norm()
    assert error < 2 * best + 0.25 * target.norm()


@every_bits
@every_granularity
def test_dorefa_passes_the_gradient_on_at_zero(bits: int, granularity: str):
    """In its value and no multiple of it: the first step is the one that a float weight takes."""
    quantizer = fitted_to_zeros("dorefa", bits, granularity)
    w = torch.zeros(6, 40, requires_grad=True)
    w_q = quantizer(w)
    assert w_q.abs().max() < 1e-6
    w_q.backward(randn(2))
    assert_close(w.grad, randn(2))


@every_bits
@every_granularity
def test_dorefa_counts_its_clip_in_units_of_the_largest_weight(bits: int, granularity: str):
    """Against the transcription with that product as its clip, gradients through the largest weight included."""
    quantizer = fitted_to_zeros("dorefa", bits, granularity).double()
    with torch.no_grad():
        quantizer.clip_value.mul_(0.8)
    w = (0.1 * randn(3).double()).requires_grad_()
    c = quantizer.clip_value.detach().clone().requires_grad_()
    dims = (0, 1) if granularity == "tensor" else (1,)
    clip = c * torch.tanh(w).abs().amax(dims, keepdim=True).reshape(SHAPES[granularity])
    expected, w_q = dorefa_weight(w, clip, torch.ones(1).double(), bits, dims), quantizer(w)
    assert_close(w_q, expected, rtol=1e-12, atol=1e-12)
    grads, reference = (
        torch.autograd.grad(y, x, randn(4).double()) for y, x in ((w_q, (w, quantizer.clip_value)), (expected, (w, c)))
    )
    for a, e in zip(grads, reference, strict=True):
        assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_dorefa_tells_channels_apart():
    w = randn(5) * 0.1
    w[2] = 0
    quantizer = DoReFaQuantizer(QuantizerSettings(4, "weight", scale_shape=(6, 1)))
    quantizer.initialize(w)
    assert ((quantizer.tanh_width < 0).flatten() == torch.arange(6).eq(2)).all()
    assert quantizer.clip_value[2] == 1 and quantizer(w)[2].abs().max() < 1e-6


@pytest.mark.parametrize("is_zero", [True, False], ids=["zero", "moved"])
@pytest.mark.parametrize("name", ["dorefa", "pact"])
def test_dorefa_packs_and_unpacks_them(name: str, is_zero: bool):
    layer = torch.nn.Linear(40, 6)
    quantizer = fitted_to_zeros(name, 4, "channel")
    layer.weight.data.copy_(torch.zeros(6, 40) if is_zero else 0.1 * randn(6))
    packed = PackedLayer.from_quantized(QuantLinear.from_float(layer, quantizer, None))
    assert torch.equal(packed.quantized_weight(), quantizer(layer.weight))
    again = packed.to_quantized()
    assert torch.equal(again.weight_quantizer.quantize(again.weight), packed.codes())
    assert_close(again.quantized_weight(), packed.quantized_weight(), rtol=1e-5, atol=0)
    assert (again.weight_quantizer.tanh_width < 0).all() == is_zero

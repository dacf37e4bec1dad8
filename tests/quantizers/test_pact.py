"""PACT against the formulas of arXiv:1805.06085."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_saq.quantizers import DoReFaQuantizer, PACTQuantizer, QuantizerSettings


def activation(minimum: float = -1.0) -> Tensor:
    x = torch.rand(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * (4 - minimum) + minimum


def fitted(bits: int, signed: bool | None, alpha: float) -> PACTQuantizer:
    quantizer = PACTQuantizer(QuantizerSettings(bits, "activation", signed=signed)).double()
    quantizer.initialize(activation().reshape(-1))
    with torch.no_grad():
        quantizer.clip_value.fill_(alpha)
    return quantizer


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_value_and_gradients_are_the_papers(bits: int):
    alpha, n = 2.7, 2**bits - 1
    x = activation().requires_grad_()
    quantizer = fitted(bits, False, alpha)
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)  # the paper's form of clip(x, 0, alpha)
    expected = (y * n / alpha).round() * alpha / n
    y_q = quantizer(x)
    assert_close(y_q, expected, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(-1, 3, x.numel(), dtype=torch.float64).view_as(x)
    grad_x, grad_alpha = torch.autograd.grad(y_q, (x, quantizer.clip_value), grad)
    assert_close(grad_x, grad * ((x > 0) & (x < alpha)))
    assert_close(grad_alpha, grad[x.detach() >= alpha].sum().reshape(1), rtol=1e-12, atol=0)


def test_alpha_learns_nothing_from_values_inside():
    quantizer = fitted(4, False, 100.0)
    quantizer(activation(0.0)).sum().backward()
    assert quantizer.clip_value.grad.item() == 0


def test_signed_activations_use_the_grid_through_zero():
    x = activation()
    quantizer = fitted(4, None, 0.7)
    assert quantizer.signed
    assert_close(quantizer(x), (x / 0.1).round().clamp(-8, 7) * 0.1)
    quantizer(x).sum().backward()
    expected = (x > 0.7).sum() - (x < -0.8).sum() * 8 / 7
    assert_close(quantizer.clip_value.grad, expected.double().reshape(1))


@pytest.mark.parametrize("minimum", [0.0, -1.0])
def test_auto_follows_the_smallest_value(minimum: float):
    x = activation(minimum)
    quantizer = PACTQuantizer(QuantizerSettings(4, "activation", signed=None, scale_init="mean"))
    quantizer.initialize(x.reshape(-1))
    assert quantizer.signed is (minimum < 0)
    assert_close(quantizer.clip_value.detach(), x.max().float().reshape(1))


def test_weights_are_those_of_dorefa():
    w = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 0.2
    for shape in ((1,), (6, 1)):
        pact, dorefa = (
            kind(QuantizerSettings(3, "weight", scale_shape=shape)) for kind in (PACTQuantizer, DoReFaQuantizer)
        )
        for quantizer in (pact, dorefa):
            quantizer.initialize(w)
        assert torch.equal(pact(w), dorefa(w))
        assert torch.equal(pact.quantize(w), dorefa.quantize(w))

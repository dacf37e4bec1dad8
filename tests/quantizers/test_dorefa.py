"""DoReFa against a plain transcription of the formulas of arXiv:1606.06160."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_saq.quantizers import DoReFaQuantizer, QuantizerSettings, round_straight_through

every_granularity = pytest.mark.parametrize("scale_shape", [(1,), (6, 1)], ids=["tensor", "channel"])


def weight(largest: float = 0.2) -> Tensor:
    w = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return w / w.abs().max() * largest


def quantize_k(a: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1
    return round_straight_through(a * n) / n


def dorefa_weight(w: Tensor, c: Tensor, t: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    squashed = torch.tanh(w / t)
    largest = squashed.abs().amax(dims, keepdim=True)
    return c * (2 * quantize_k(squashed / (2 * largest) + 0.5, bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("largest", [0.2, 3.0], ids=["small", "large"])
@every_granularity
def test_weights_are_the_transcription_with_its_gradients(bits: int, largest: float, scale_shape):
    w = weight(largest).requires_grad_()
    quantizer = DoReFaQuantizer(QuantizerSettings(bits, "weight", scale_shape=scale_shape)).double()
    quantizer.initialize(w)
    with torch.no_grad():
        quantizer.clip_value.mul_(0.9)
    c = quantizer.clip_value.detach().clone().requires_grad_()
    expected = dorefa_weight(w, c, quantizer.tanh_width, bits, (0, 1) if scale_shape == (1,) else (1,))
    w_q = quantizer(w)
    assert_close(w_q, expected, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(-1, 3, w.numel(), dtype=torch.float64).view_as(w)
    for a, e in zip(
        torch.autograd.grad(w_q, (w, quantizer.clip_value), grad),
        torch.autograd.grad(expected, (w, c), grad),
        strict=True,
    ):
        assert_close(a, e, rtol=1e-9, atol=1e-9)


@every_granularity
def test_tanh_is_the_papers_for_small_weights_and_wider_for_large_ones(scale_shape):
    for largest in (0.2, 3.0):
        w = weight(largest).float()
        quantizer = DoReFaQuantizer(QuantizerSettings(4, "weight", scale_shape=scale_shape))
        quantizer.initialize(w)
        shared = w.abs().max() if scale_shape == (1,) else w.abs().amax(1, keepdim=True)
        assert_close(quantizer.tanh_width, (4 * shared).clamp_min(1).reshape(scale_shape))


@pytest.mark.parametrize("largest", [0.2, 3.0], ids=["small", "large"])
@pytest.mark.parametrize("scale_init", ["mse", "mean"])
def test_large_weights_keep_their_values_at_load(largest: float, scale_init):
    w = weight(largest).float()
    quantizer = DoReFaQuantizer(QuantizerSettings(8, "weight", scale_init=scale_init))
    quantizer.initialize(w)
    # Half a step, 0.4% of the largest, and 2% of itself for the largest.
    assert (quantizer(w) - w).abs().max() < 0.026 * largest


@pytest.mark.parametrize("bits", [2, 4])
@every_granularity
def test_mse_initialization_is_least_squares(bits: int, scale_shape):
    w = weight()
    quantizer = DoReFaQuantizer(QuantizerSettings(bits, "weight", scale_shape=scale_shape)).double()
    quantizer.initialize(w)
    (quantizer(w) - w).square().sum().backward()
    assert_close(quantizer.clip_value.grad, torch.zeros(scale_shape, dtype=torch.float64), rtol=0, atol=1e-10)


def test_mean_initialization_keeps_small_weights():
    w = weight()
    quantizer = DoReFaQuantizer(QuantizerSettings(8, "weight", scale_init="mean")).double()
    quantizer.initialize(w)
    assert_close(quantizer.clip_value.detach(), torch.tanh(w.abs().max()).reshape(1))
    assert_close(quantizer.squash(w) * quantizer.clip_value.detach(), torch.tanh(w))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_are_clipped_to_a_range_that_stays(bits: int):
    x = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x / x.max() * 3).requires_grad_()
    quantizer = DoReFaQuantizer(QuantizerSettings(bits, "activation", signed=None, scale_init="mean")).double()
    quantizer.initialize(x.detach() / 2)
    c = quantizer.clip_value
    assert_close(c.detach(), torch.tensor([1.5], dtype=torch.float64))
    assert not c.requires_grad
    x_q = quantizer(x)
    assert_close(x_q, c * quantize_k((x / c).clamp(0, 1), bits), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(x_q.sum(), x)
    assert_close(grad, (x <= c).double())


def test_negative_activations_take_the_signed_grid_through_zero():
    x = torch.linspace(-1, 3, 402)
    quantizer = DoReFaQuantizer(QuantizerSettings(4, "activation", signed=None, scale_init="mean"))
    quantizer.initialize(x)
    assert quantizer.signed and not quantizer.has_offset
    assert_close(quantizer(x), (x / (3 / 7)).round().clamp(-8, 7) * (3 / 7))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_the_range_of_activations_stays_fixed_where_all_parameters_are_made_trainable(signed: bool):
    """A user freezes a backbone and thaws all of it: the fixed range was learned from then on, as in PACT."""
    quantizer = DoReFaQuantizer(QuantizerSettings(3, "activation", signed))
    x = torch.linspace(0, 2, 20)
    quantizer.initialize(x)
    for p in quantizer.parameters():
        p.requires_grad_(True)
    x.requires_grad_()
    quantizer(x * 1.5).sum().backward()
    assert quantizer.clip_value.grad is None and x.grad.abs().sum() > 0

"""LIQ against a plain transcription of its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_saq.quantizers import LIQQuantizer, QuantizerSettings, round_straight_through

every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda b: f"{b}bit")
every_granularity = pytest.mark.parametrize("scale_shape", [(1,), (6, 1)], ids=["tensor", "channel"])


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    return w * torch.linspace(0.05, 0.3, 6, dtype=torch.float64)[:, None] + 0.04


def liq_weight(w: Tensor, clip_value: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    """Standardise, clip, round onto `2^b` levels of `[-c, c]`, and undo the standardisation."""
    mean, std = w.detach().mean(dims, keepdim=True), w.detach().std(dims, keepdim=True)
    n = 2**bits - 1
    x = ((w - mean) / std / clip_value).clamp(-1, 1)
    x = (x + 1) / 2
    x = round_straight_through(x * n) / n
    return (x * 2 - 1) * clip_value * std + mean


def liq_activation(x: Tensor, clip_value: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1
    return round_straight_through((x / clip_value).clamp(0, 1) * n) / n * clip_value


@every_bits
@every_granularity
def test_weights_are_the_transcription_with_its_gradients(bits: int, scale_shape):
    w = weight().requires_grad_()
    quantizer = LIQQuantizer(QuantizerSettings(bits, "weight", scale_shape=scale_shape)).double()
    quantizer.initialize(w)
    with torch.no_grad():
        quantizer.clip_value.mul_(torch.linspace(0.7, 0.9, quantizer.clip_value.numel()).reshape(scale_shape))
    clip_value = quantizer.clip_value.detach().clone().requires_grad_()
    expected = liq_weight(w, clip_value, bits, (0, 1) if scale_shape == (1,) else (1,))
    w_q = quantizer(w)
    assert_close(w_q, expected, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(-1, 3, w.numel(), dtype=torch.float64).view_as(w)
    actual = torch.autograd.grad(w_q, (w, quantizer.clip_value), grad)
    reference = torch.autograd.grad(expected, (w, clip_value), grad)
    for a, r in zip(actual, reference, strict=True):
        assert_close(a, r, rtol=1e-9, atol=1e-9)


@every_bits
def test_activations_are_the_transcription_with_its_gradients(bits: int):
    x = torch.rand(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    quantizer = LIQQuantizer(QuantizerSettings(bits, "activation", signed=None)).double()
    quantizer.initialize(x.detach().reshape(-1) * 0.8)
    clip_value = quantizer.clip_value.detach().clone().requires_grad_()
    expected, x_q = liq_activation(x, clip_value, bits), quantizer(x)
    assert_close(x_q, expected, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(-1, 3, x.numel(), dtype=torch.float64).view_as(x)
    for a, r in zip(
        torch.autograd.grad(x_q, (x, quantizer.clip_value), grad),
        torch.autograd.grad(expected, (x, clip_value), grad),
        strict=True,
    ):
        assert_close(a, r, rtol=1e-9, atol=1e-9)


@every_bits
def test_levels_are_evenly_spaced_around_the_mean_and_leave_it_out(bits: int):
    w = torch.linspace(-1, 3, 10001)
    quantizer = LIQQuantizer(QuantizerSettings(bits, "weight", scale_init="mean"))
    quantizer.initialize(w)
    levels = torch.unique(quantizer.dequantize(quantizer.quantize(w), w))
    assert levels.numel() == 2**bits
    assert_close(levels.diff(), levels.diff()[:1].expand(2**bits - 1), rtol=1e-3, atol=1e-6)
    assert_close(levels - w.mean(), -(levels - w.mean()).flip(0), rtol=1e-4, atol=1e-5)
    assert ((levels - w.mean()).abs() > 0.4 * levels.diff()[0]).all()
    assert_close(levels[-1], w.mean() + quantizer.clip_value.detach()[0] * w.std())


def test_shifting_and_scaling_the_weight_does_the_same_to_its_quantized_form():
    w = weight().float()
    quantizer = LIQQuantizer(QuantizerSettings(3, "weight"))
    quantizer.initialize(w)
    assert_close(quantizer(w * 5 - 2), quantizer(w) * 5 - 2, rtol=1e-4, atol=1e-5)


def test_first_clip_values():
    w = weight().float()
    quantizer = LIQQuantizer(QuantizerSettings(4, "weight", scale_shape=(6, 1), scale_init="mean"))
    quantizer.initialize(w)
    w_hat = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
    assert_close(quantizer.clip_value.detach(), 0.8 * w_hat.abs().amax(1, keepdim=True))
    activation = LIQQuantizer(QuantizerSettings(4, "activation", signed=None, scale_init="mean"))
    activation.initialize(torch.tensor([0.0, 1.0, 5.0]))
    assert_close(activation.clip_value.detach(), torch.tensor([4.0]))


@pytest.mark.parametrize("bits", [2, 4])
def test_mse_initialization_beats_other_clip_values(bits: int):
    w = weight().float()
    quantizer = LIQQuantizer(QuantizerSettings(bits, "weight"))
    quantizer.initialize(w)
    best, clip_value = (quantizer(w) - w).square().mean(), quantizer.clip_value.detach().clone()
    for fraction in (0.5, 0.8, 0.9, 1.1, 1.2, 1.5):
        with torch.no_grad():
            quantizer.clip_value.copy_(clip_value * fraction)
        assert (quantizer(w) - w).square().mean() >= best * 0.999


def test_negative_activations_take_the_signed_grid_through_zero():
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).clamp_min(-1)
    quantizer = LIQQuantizer(QuantizerSettings(4, "activation", signed=None))
    quantizer.initialize(x.reshape(-1))
    assert quantizer.signed and not quantizer.has_offset
    x_q = quantizer(x)
    assert x_q.min() < -0.9 and (x_q == 0).any()
    assert_close(x_q.max(), quantizer.clip_value.detach()[0])
    scale, offset = quantizer.grid()
    assert_close(scale, quantizer.clip_value.detach() / 7)
    assert (offset == 0).all()


def test_unsigned_activations_cut_negative_values():
    x = torch.linspace(-1, 1, 101)
    quantizer = LIQQuantizer(QuantizerSettings(4, "activation", signed=False))
    quantizer.initialize(x)
    assert (quantizer(x)[x <= 0] == 0).all()


def test_the_grid_of_a_weight_asks_for_the_weight():
    quantizer = LIQQuantizer(QuantizerSettings(4, "weight"))
    quantizer.path = "0.weight_quantizer"
    w = weight().float()
    quantizer.initialize(w)
    with pytest.raises(ValueError, match=r"0\.weight_quantizer: .*mean and standard deviation of the weight; pass it"):
        quantizer.dequantize(quantizer.quantize(w))


def test_weights_have_signed_codes():
    with pytest.raises(ValueError, match="LIQQuantizer: signed=False; expected True"):
        LIQQuantizer(QuantizerSettings(4, "weight", signed=False))


def test_a_constant_weight_can_still_learn():
    w = torch.zeros(4, 8)
    quantizer = LIQQuantizer(QuantizerSettings(4, "weight"))
    quantizer.initialize(w)
    moved = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer(moved).sum().backward()
    assert (moved.grad != 0).float().mean() > 0.5

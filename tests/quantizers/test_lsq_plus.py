"""LSQ+ against the formulas of arXiv:2004.09576."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.quantizers import (
    LSQPlusQuantizer,
    LSQQuantizer,
    QuantizerSettings,
    affine_fake_quantize,
    round_straight_through,
)
from hf_saq.quantizers.scale_search import mse_range


def gelu_output(seed: int = 0) -> Tensor:
    return nn.functional.gelu(torch.randn(4, 3000, generator=torch.Generator().manual_seed(seed)) * 2)


def affine_reference(x: Tensor, s: Tensor, o: Tensor, qmin: int, qmax: int) -> Tensor:
    """The paper's equations as ordinary autograd operations."""
    return round_straight_through(((x - o) / s).clamp(qmin, qmax)) * s + o


@pytest.mark.parametrize("shape", [(1,), (5, 1)], ids=["tensor", "channel"])
@pytest.mark.parametrize(("qmin", "qmax"), [(0, 3), (0, 15), (-8, 7)])
def test_value_and_gradients_are_the_papers(shape, qmin: int, qmax: int):
    generator = torch.Generator().manual_seed(0)
    s = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    o = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    v = torch.randint(qmin - 2, qmax + 3, (5, 200), generator=generator)
    v = v + (torch.rand(5, 200, generator=generator, dtype=torch.float64) - 0.5) * 0.8  # away from rounding edges
    x = (v * s + o).detach().requires_grad_()
    grad = torch.linspace(-1, 3, x.numel(), dtype=torch.float64).view_as(x)
    x_q = affine_fake_quantize(x, s, o, qmin, qmax, grad_scale=0.37)
    assert_close(x_q, affine_reference(x, s, o, qmin, qmax), rtol=1e-14, atol=1e-14)

    outside = (v < qmin) | (v > qmax)
    ds = torch.where(v < qmin, float(qmin), torch.where(v > qmax, float(qmax), v.round() - v))
    expected = (
        grad.masked_fill(outside, 0),
        (ds * grad).sum_to_size(shape) * 0.37,
        (outside * grad).sum_to_size(shape) * 0.37,
    )
    actual = torch.autograd.grad(x_q, (x, s, o), grad)
    reference = torch.autograd.grad(affine_reference(x, s, o, qmin, qmax), (x, s, o), grad)
    factors = (1, 0.37, 0.37)
    for a, e, r, factor in zip(actual, expected, reference, factors, strict=True):
        assert_close(a, e, rtol=1e-10, atol=1e-10)
        assert_close(a, r * factor, rtol=1e-10, atol=1e-10)


def test_offset_gradient_outside_the_grid_is_the_slope_itself():
    x = torch.tensor([-30.0, 40.0, 50.0], dtype=torch.float64)
    s = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    o = torch.tensor([-0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, o: affine_fake_quantize(x, s, o, 0, 15), (s, o))


@pytest.mark.parametrize("data", ["negative", "nonnegative"])
def test_auto_is_affine_whatever_the_data(data: str):
    x = gelu_output() if data == "negative" else gelu_output().abs()
    quantizer = LSQPlusQuantizer(QuantizerSettings(4, "activation", signed=None))
    assert set(dict(quantizer.named_parameters())) == {"scale", "offset"}  # before any data
    quantizer.initialize(x.reshape(-1))
    assert quantizer.has_offset and not quantizer.signed and (quantizer.qmin, quantizer.qmax) == (0, 15)
    x_q = quantizer(x)
    assert torch.unique(x_q).numel() == 16
    assert_close(x_q.min(), quantizer.offset.detach()[0])


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("scale_init", ["mse", "mean"])
def test_other_modes_are_lsq(signed: bool, scale_init):
    x = gelu_output()
    quantizer = LSQPlusQuantizer(QuantizerSettings(4, "activation", signed=signed, scale_init=scale_init))
    lsq = LSQQuantizer(QuantizerSettings(4, "activation", signed=signed, scale_init=scale_init))
    for q in (quantizer, lsq):
        q.initialize(x.reshape(-1))
    assert not quantizer.has_offset and set(quantizer.state_dict()) == set(lsq.state_dict())
    assert torch.equal(quantizer(x), lsq(x))


def test_weights_start_by_three_standard_deviations():
    w = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.03
    for shape, dim in (((1,), (0, 1)), ((6, 1), (1,))):
        quantizer = LSQPlusQuantizer(QuantizerSettings(4, "weight", scale_shape=shape, scale_init="mean"))
        quantizer.initialize(w)
        mean, std = w.mean(dim), w.std(dim)
        expected = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 8
        assert_close(quantizer.scale.detach(), expected.reshape(shape))
        assert not quantizer.has_offset


def test_mean_initialization_spans_the_extremes():
    x = gelu_output()
    quantizer = LSQPlusQuantizer(QuantizerSettings(4, "activation", signed=None, scale_init="mean"))
    quantizer.initialize(x.reshape(-1))
    assert_close(quantizer.offset.detach(), x.min().reshape(1))
    assert_close(quantizer.scale.detach(), ((x.max() - x.min()) / 15).reshape(1))


@pytest.mark.parametrize("bits", [2, 4])
def test_mse_initialization_is_near_the_best_pair_of_ends(bits: int):
    x = gelu_output().reshape(-1)
    levels = 2**bits
    low, high = mse_range(x, levels)

    def error(low: Tensor, high: Tensor) -> float:
        step = (high - low) / (levels - 1)
        return (affine_fake_quantize(x, step, low, 0, levels - 1) - x).square().mean().item()

    best = min(
        error(a.reshape(1), b.reshape(1))
        for a in torch.linspace(x.min(), 0.5, 30)
        for b in torch.linspace(0.7, x.max(), 60)
    )
    assert error(low, high) <= 1.05 * best
    assert error(low, high) < 0.9 * error(x.min().reshape(1), x.max().reshape(1))


def test_the_offset_beats_lsq_on_gelu_outputs():
    x = gelu_output()
    errors = {}
    for kind in (LSQQuantizer, LSQPlusQuantizer):
        quantizer = kind(QuantizerSettings(3, "activation", signed=None))
        quantizer.initialize(x.reshape(-1))
        errors[kind] = (quantizer(x) - x).square().mean()
    assert errors[LSQPlusQuantizer] < 0.5 * errors[LSQQuantizer]


def test_constant_activations_stay_what_they_are():
    x = torch.full((4, 10), 3.0)
    for scale_init in ("mse", "mean"):
        quantizer = LSQPlusQuantizer(QuantizerSettings(4, "activation", signed=None, scale_init=scale_init))
        quantizer.initialize(x.reshape(-1))
        assert_close(quantizer(x), x, rtol=1e-6, atol=0)


def test_gradients_of_scale_and_offset_have_the_factor_of_lsq():
    x = gelu_output()
    quantizer = LSQPlusQuantizer(QuantizerSettings(4, "activation", signed=None))
    quantizer.initialize(x.reshape(-1) * 0.9)
    s, o = (p.detach().clone().requires_grad_() for p in (quantizer.scale, quantizer.offset))
    affine_reference(x, s, o, 0, 15).sum().backward()
    quantizer(x).sum().backward()
    factor = 1 / math.sqrt(3000 * 15)  # elements of one sample
    assert_close(quantizer.scale.grad, s.grad * factor, rtol=1e-3, atol=1e-3)
    assert_close(quantizer.offset.grad, o.grad * factor, rtol=1e-3, atol=1e-3)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


@pytest.mark.parametrize("mode", ["auto", "affine"])
def test_the_mode_reaches_the_layers_of_a_model(mode: str):
    config = SAQQuantizationConfig(weight_bits=8, activation_bits=8, quantizer="lsq_plus", activation_mode=mode)
    model, x = small_model(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    calibrate(quantize(model, config), [x])
    assert model[2].activation_quantizer.has_offset and model[2].activation_quantizer.offset.item() < -0.1
    assert (model(x) - expected).norm() < 0.03 * expected.norm()


def test_affine_is_refused_by_name_of_the_field():
    with pytest.raises(
        ValueError,
        match=r"SAQQuantizationConfig\.activation_mode='affine' is not possible with quantizer='lsq'; expected one of "
        r"\['auto', 'signed', 'unsigned'\], or a quantizer that can do it: \['lsq_plus'\]",
    ):
        SAQQuantizationConfig(activation_mode="affine")
    with pytest.raises(ValueError, match=r"activation_mode='afine'; expected one of .*'affine'"):
        SAQQuantizationConfig(quantizer="lsq_plus", activation_mode="afine")
    with pytest.raises(ValueError, match=r"overrides\['2'\]\.activation_mode='affine' is not possible with .*'pact'"):
        SAQQuantizationConfig(overrides={"2": {"quantizer": "pact", "activation_mode": "affine"}})


def test_affine_is_refused_where_overrides_lead_to_it():
    config = SAQQuantizationConfig(overrides={"2": {"activation_mode": "affine"}})
    with pytest.raises(ValueError, match=r"2: activation_mode='affine' is not possible with quantizer='lsq'"):
        quantize(small_model(), config)


def test_overrides_may_set_quantizer_and_mode_apart():
    overrides = {"2": {"quantizer": "lsq_plus"}, "*2": {"activation_mode": "affine"}}
    model = quantize(small_model(), SAQQuantizationConfig(overrides=overrides))
    assert model[2].activation_quantizer.has_offset and not model[0].activation_quantizer.has_offset

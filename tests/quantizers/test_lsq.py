"""LSQ against the formulas of arXiv:1902.08153."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_saq.quantizers import LSQQuantizer, QuantizerSettings, lsq_fake_quantize, mse_scale
from hf_saq.quantizers.straight_through import positive, round_straight_through

GRIDS = {"signed-2bit": (-2, 1), "signed-4bit": (-8, 7), "unsigned-4bit": (0, 15), "signed-8bit": (-128, 127)}
every_grid = pytest.mark.parametrize(("qmin", "qmax"), list(GRIDS.values()), ids=list(GRIDS))
every_shape = pytest.mark.parametrize("scale_shape", [(1,), (5, 1)], ids=["tensor", "channel"])


def sample(scale_shape: tuple[int, ...], qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """`x (5, 200)` in float64, in part outside the grid and nowhere near a rounding edge, and a scale."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(scale_shape, generator=generator, dtype=torch.float64) + 0.5
    code = torch.randint(qmin - 2, qmax + 3, (5, 200), generator=generator)
    inside_step = (torch.rand(5, 200, generator=generator, dtype=torch.float64) - 0.5) * 0.8
    return (code + inside_step) * scale, scale


def lsq_reference(x: Tensor, scale: Tensor, qmin: int, qmax: int, grad_scale: float) -> Tensor:
    """Compute Eq. 1-2 of the paper by autograd operations: the slow form that `lsq_fake_quantize` must equal."""
    s = positive(scale)
    s = s * grad_scale + (s - s * grad_scale).detach()  # the value of s, `grad_scale` times its gradient
    return round_straight_through((x / s).clamp(qmin, qmax)) * s


def closed_form(x: Tensor, scale: Tensor, qmin: int, qmax: int, g: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `scale` by Eq. 3 and 5 of the paper, written out."""
    v = x / scale
    below, above = v <= qmin, v >= qmax
    grad_x = torch.where(below | above, 0.0, grad)
    ds = torch.where(below, float(qmin), torch.where(above, float(qmax), v.round() - v))
    return grad_x, (ds * grad).sum_to_size(scale.shape) * g


@every_grid
@every_shape
def test_value_and_gradients_are_the_papers(scale_shape, qmin: int, qmax: int):
    x, scale = sample(scale_shape, qmin, qmax)
    x.requires_grad_()
    scale.requires_grad_()
    grad = torch.linspace(-1, 3, x.numel(), dtype=torch.float64).view_as(x)
    x_q = lsq_fake_quantize(x, scale, qmin, qmax, grad_scale=0.37)
    assert_close(x_q, (x / scale).round().clamp(qmin, qmax) * scale, rtol=1e-14, atol=0)
    actual = torch.autograd.grad(x_q, (x, scale), grad)
    expected = closed_form(x.detach(), scale.detach(), qmin, qmax, 0.37, grad)
    reference = torch.autograd.grad(lsq_reference(x, scale, qmin, qmax, 0.37), (x, scale), grad)
    for a, e, r in zip(actual, expected, reference, strict=True):
        assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert_close(a, r, rtol=1e-12, atol=1e-12)


@every_shape
def test_scale_gradient_is_the_slope_of_the_straight_through_surrogate(scale_shape):
    """Rounding passed straight through means: the rounding error `round(v) - v` is a constant in `v`."""
    qmin, qmax, h = -8, 7, 1e-6
    x, scale = sample(scale_shape, qmin, qmax)
    rounding_error = (x / scale).clamp(qmin, qmax).round() - (x / scale).clamp(qmin, qmax)

    def surrogate(s: Tensor) -> Tensor:
        return (((x / s).clamp(qmin, qmax) + rounding_error) * s).sum_to_size(scale_shape)

    slope = (surrogate(scale + h) - surrogate(scale - h)) / (2 * h)
    leaf = scale.clone().requires_grad_()
    lsq_fake_quantize(x, leaf, qmin, qmax).sum().backward()
    assert_close(leaf.grad, slope, rtol=1e-6, atol=1e-5)


def test_scale_gradient_outside_the_grid_is_the_slope_itself():
    x = torch.tensor([-30.0, 40.0, 50.0], dtype=torch.float64)
    scale = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: lsq_fake_quantize(x, s, -8, 7), (scale,))


@pytest.mark.parametrize(
    ("role", "scale_shape", "elements"),
    [("weight", (1,), 1000), ("weight", (5, 1), 200), ("activation", (1,), 200)],  # of one sample, for activations
    ids=["weight-tensor", "weight-channel", "activation"],
)
def test_gradient_factor_counts_the_elements_of_one_scale(role, scale_shape, elements):
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    quantizer = LSQQuantizer(QuantizerSettings(4, role, signed=True, scale_shape=scale_shape))
    quantizer.initialize(x)
    quantizer(x).sum().backward()
    _, expected = closed_form(x, quantizer.scale.detach(), -8, 7, 1 / math.sqrt(elements * 7), torch.ones_like(x))
    assert_close(quantizer.scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_frozen_operands_get_no_gradient():
    x = torch.randn(4, 4)
    scale = torch.tensor([0.3], requires_grad=True)
    lsq_fake_quantize(x, scale, -8, 7).sum().backward()
    assert x.grad is None and scale.grad is not None
    x.requires_grad_()
    frozen = torch.tensor([0.3])
    lsq_fake_quantize(x, frozen, -8, 7).sum().backward()
    assert x.grad is not None and frozen.grad is None


@every_shape
def test_mean_initialization(scale_shape):
    w = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    quantizer = LSQQuantizer(QuantizerSettings(4, "weight", scale_shape=scale_shape, scale_init="mean"))
    quantizer.initialize(w)
    mean = w.abs().mean() if scale_shape == (1,) else w.abs().mean(dim=1, keepdim=True)
    assert_close(quantizer.scale.detach(), (2 * mean / math.sqrt(7)).reshape(scale_shape))


@pytest.mark.parametrize("bits", [2, 4, 8])
@every_shape
def test_mse_initialization_is_near_the_best_of_a_finer_grid(bits: int, scale_shape):
    w = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    quantizer = LSQQuantizer(QuantizerSettings(bits, "weight", scale_shape=scale_shape, scale_init="mse"))
    quantizer.initialize(w)

    def error(scale: Tensor) -> Tensor:
        squared = (lsq_fake_quantize(w, scale, quantizer.qmin, quantizer.qmax) - w).square()
        return squared.mean() if scale_shape == (1,) else squared.mean(dim=1, keepdim=True)

    best = error(quantizer.scale.detach())
    largest = w.abs().max() if scale_shape == (1,) else w.abs().amax(dim=1, keepdim=True)
    # The search goes in steps of 1%, which at 8 bits is more than one code for the largest values.
    tolerance = 1.15 if bits == 8 else 1.02
    for fraction in torch.linspace(0.05, 1.2, 231):
        other = (largest * fraction / quantizer.qmax).reshape(scale_shape)
        assert (best <= tolerance * error(other)).all()


def test_mse_scale_of_zeros_is_zero():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    scale = mse_scale(x, (2, 1), -8, 7)
    assert scale[0] == 0 and scale[1] > 0


def test_mse_scale_of_a_shifted_grid_finds_it():
    scale, shift = 0.3, 0.5
    x = scale * (torch.arange(-8, 8) + shift)
    assert_close(mse_scale(x, (1,), -8, 7, shift=shift), torch.tensor([scale]))


@pytest.mark.parametrize(
    ("requested", "smallest", "expected"),
    [(None, 0.0, False), (None, -0.01, True), (True, 0.0, True), (False, -1.0, False)],
    ids=["auto-nonnegative", "auto-negative", "signed", "unsigned"],
)
def test_sign_decision(requested: bool | None, smallest: float, expected: bool):
    quantizer = LSQQuantizer(QuantizerSettings(4, "activation", signed=requested))
    quantizer.initialize(torch.tensor([smallest, 1.0, 2.0]))
    assert quantizer.signed is expected
    assert (quantizer.qmin, quantizer.qmax) == ((-8, 7) if expected else (0, 15))
    assert int(quantizer.range_state) == (100 if expected else 50)


def test_sign_decision_sees_the_minimum_outside_of_the_sample():
    quantizer = LSQQuantizer(QuantizerSettings(4, "activation", signed=None))
    quantizer.initialize(torch.tensor([0.5, 1.0]), minimum=-0.2)
    assert quantizer.signed


def test_no_forward_before_a_range():
    quantizer = LSQQuantizer(QuantizerSettings(4, "activation", signed=None))
    quantizer.path = "encoder.0.activation_quantizer"
    with pytest.raises(RuntimeError, match=r"encoder\.0\.activation_quantizer: this activation quantizer has no"):
        quantizer(torch.ones(3))


def test_no_range_from_nothing():
    with pytest.raises(ValueError, match="LSQQuantizer: cannot fit a range to an empty tensor"):
        LSQQuantizer(QuantizerSettings(4, "weight")).initialize(torch.empty(0))


def test_a_damaged_range_state_is_named():
    quantizer = LSQQuantizer(QuantizerSettings(4, "weight"))
    quantizer.path = "head.weight_quantizer"
    quantizer.initialize(torch.randn(3, 3))
    state = quantizer.state_dict()
    state["range_state"] = torch.tensor(7, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"head\.weight_quantizer\.range_state is 7; expected 35 .*damaged"):
        quantizer.load_state_dict(state)

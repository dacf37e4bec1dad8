"""What every quantizer of the registry must keep, over bits, granularity and role."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_saq.layers import PackedLayer, QuantConv2d, QuantLinear
from hf_saq.quantizers import QUANTIZERS, DoReFaQuantizer, Quantizer, QuantizerSettings, quantizer_class

BITS = [2, 3, 4, 5, 6, 7, 8]
NAMES = sorted(QUANTIZERS)
GRANULARITIES = {"tensor": (1,), "channel": (6, 1)}

every_weight = pytest.mark.parametrize("granularity", GRANULARITIES)
every_bits = pytest.mark.parametrize("bits", BITS, ids=lambda b: f"{b}bit")
some_bits = pytest.mark.parametrize("bits", [2, 4, 8], ids=lambda b: f"{b}bit")
every_name = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
# (signed, data): what calibration may meet.
every_activation = pytest.mark.parametrize(
    ("signed", "data"),
    [(None, "relu"), (None, "gelu"), (True, "gelu"), (False, "relu")],
    ids=["auto-relu", "auto-gelu", "signed-gelu", "unsigned-relu"],
)


def weight_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of different size, off centre: `(6, 40)`."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.05, 0.2, 6)[:, None]
    return (torch.randn(6, 40, generator=generator) * size + 0.02).to(dtype)


def activation_of(data: str, seed: int = 0) -> Tensor:
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(seed)) * 2
    return nn.functional.relu(x) if data == "relu" else nn.functional.gelu(x)


def weight_quantizer(name: str, bits: int, granularity: str, weight: Tensor, scale_init="mean") -> Quantizer:
    shape = GRANULARITIES[granularity]
    quantizer = quantizer_class(name)(QuantizerSettings(bits, role="weight", scale_shape=shape, scale_init=scale_init))
    quantizer.initialize(weight)
    return quantizer


def activation_quantizer(name: str, bits: int, signed: bool | None, x: Tensor, scale_init="mean") -> Quantizer:
    quantizer = quantizer_class(name)(QuantizerSettings(bits, role="activation", signed=signed, scale_init=scale_init))
    quantizer.initialize(x.reshape(-1))
    return quantizer


def alter(quantizer: Quantizer) -> None:
    """Move every learned value away from what a fresh fit would give."""
    with torch.no_grad():
        for i, parameter in enumerate(quantizer.parameters()):
            parameter.mul_(0.8).add_(0.003 * (i + 1))


@every_name
@every_bits
@every_weight
def test_weight_codes_are_those_of_fake_quantize(name: str, bits: int, granularity: str):
    w = weight_of()
    quantizer = weight_quantizer(name, bits, granularity, w)
    alter(quantizer)
    codes = quantizer.quantize(w)
    assert codes.dtype == torch.int16
    assert -(2 ** (bits - 1)) <= int(codes.min()) < int(codes.max()) <= 2 ** (bits - 1) - 1
    # The same float32 operations in the same order.
    assert_close(quantizer.dequantize(codes, w), quantizer.fake_quantize(w), rtol=1e-6, atol=1e-7)


@every_name
@every_bits
@every_activation
def test_activation_codes_are_those_of_fake_quantize(name: str, bits: int, signed: bool | None, data: str):
    x = activation_of(data)
    quantizer = activation_quantizer(name, bits, signed, x)
    alter(quantizer)
    codes = quantizer.quantize(x)
    assert quantizer.qmin <= int(codes.min()) and int(codes.max()) <= quantizer.qmax
    assert quantizer.qmax - quantizer.qmin == 2**bits - 1
    assert_close(quantizer.dequantize(codes), quantizer.fake_quantize(x), rtol=1e-6, atol=1e-6)


@every_name
@every_weight
@pytest.mark.parametrize("scale_init", ["mse", "mean"])
@pytest.mark.parametrize("size", [1.0, 10.0], ids=["small", "large"])
def test_eight_bit_weights_keep_the_float_function(name: str, granularity: str, scale_init: str, size: float):
    w = weight_of() * size
    quantizer = weight_quantizer(name, 8, granularity, w, scale_init)
    error = quantizer(w) - w
    # LSQ's mean rule and 80% of the maximum clip the tail; the tanh of DoReFa bends it by up to 2%.
    assert error.norm() / w.norm() < (0.02 if scale_init == "mse" else 0.1)
    # No systematic error: a lost mean or scale would show here.
    assert (error * w).sum().abs() / w.square().sum() < (0.005 if scale_init == "mse" else 0.06)
    assert error.mean().abs() < 0.02 * w.std()


@every_name
@every_activation
@pytest.mark.parametrize("scale_init", ["mse", "mean"])
def test_eight_bit_activations_keep_the_float_function(name: str, signed, data: str, scale_init: str):
    x = activation_of(data)
    error = activation_quantizer(name, 8, signed, x, scale_init)(x) - x
    assert error.norm() / x.norm() < (0.02 if scale_init == "mse" else 0.1)


@every_name
@some_bits
@every_weight
def test_weight_error_is_at_most_half_a_step_inside(name: str, bits: int, granularity: str):
    w = weight_of()
    quantizer = weight_quantizer(name, bits, granularity, w)
    w_q = quantizer(w)
    scale, offset = quantizer.grid(w)
    assert scale.shape == offset.shape == GRANULARITIES[granularity]
    low, high = quantizer.qmin * scale + offset, quantizer.qmax * scale + offset
    assert torch.unique(w_q[0]).numel() <= 2**bits
    before_rounding = quantizer.squash(w) * quantizer.clip_value if isinstance(quantizer, DoReFaQuantizer) else w
    clipped = torch.minimum(torch.maximum(before_rounding, low), high)
    assert ((w_q - clipped).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("name", ["lsq", "lsq_plus"])
@some_bits
@every_weight
def test_grids_without_statistics_are_idempotent(name: str, bits: int, granularity: str):
    w = weight_of()
    quantizer = weight_quantizer(name, bits, granularity, w)
    assert_close(quantizer(quantizer(w)), quantizer(w), rtol=1e-6, atol=0)


@every_name
@some_bits
@every_activation
def test_activations_are_idempotent(name: str, bits: int, signed: bool | None, data: str):
    x = activation_of(data)
    quantizer = activation_quantizer(name, bits, signed, x)
    assert_close(quantizer(quantizer(x)), quantizer(x), rtol=1e-6, atol=1e-6)


@every_name
@some_bits
@every_weight
def test_every_parameter_of_a_weight_quantizer_gets_a_gradient(name: str, bits: int, granularity: str):
    w = weight_of().requires_grad_()
    quantizer = weight_quantizer(name, bits, granularity, w)
    quantizer(w).mul(torch.linspace(-1, 2, w.numel()).view_as(w)).sum().backward()
    assert w.grad is not None and torch.isfinite(w.grad).all() and (w.grad != 0).float().mean() > 0.5
    parameters = list(quantizer.parameters())
    assert parameters
    for parameter in parameters:
        assert parameter.shape == GRANULARITIES[granularity] and parameter.dtype == torch.float32
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and (parameter.grad != 0).all()


@every_name
@some_bits
@every_activation
def test_every_trainable_parameter_of_an_activation_quantizer_gets_a_gradient(name: str, bits: int, signed, data: str):
    x = activation_of(data).requires_grad_()
    quantizer = activation_quantizer(name, bits, signed, x.detach() * 0.9)  # the largest values are clipped
    with torch.no_grad():
        if (offset := getattr(quantizer, "offset", None)) is not None:
            offset.add_(0.05)  # and the smallest
    quantizer(x).mul(torch.linspace(0.5, 2, x.numel()).view_as(x)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    for parameter in quantizer.parameters():
        assert parameter.shape == (1,) and parameter.dtype == torch.float32
        if name == "dorefa":
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and (parameter.grad != 0).all()


@every_name
@every_weight
def test_a_state_dict_carries_altered_weight_quantizers(name: str, granularity: str):
    w = weight_of() * 3
    quantizer = weight_quantizer(name, 4, granularity, w)
    alter(quantizer)
    fresh = quantizer_class(name)(QuantizerSettings(4, role="weight", scale_shape=GRANULARITIES[granularity]))
    fresh.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    assert fresh.initialized
    assert torch.equal(fresh(w), quantizer(w))
    assert not torch.equal(fresh(w), weight_quantizer(name, 4, granularity, w)(w))


@every_name
@every_activation
def test_a_state_dict_carries_altered_activation_quantizers(name: str, signed: bool | None, data: str):
    x = activation_of(data)
    quantizer = activation_quantizer(name, 4, signed, x)
    alter(quantizer)
    fresh = quantizer_class(name)(QuantizerSettings(4, role="activation", signed=signed))
    fresh.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    assert fresh.initialized and fresh.signed == quantizer.signed
    assert torch.equal(fresh(x), quantizer(x))


@every_name
@every_weight
def test_reset_forgets_the_range_and_a_new_fit_finds_it_again(name: str, granularity: str):
    w = weight_of() * 3
    quantizer = weight_quantizer(name, 4, granularity, w)
    before = quantizer(w)
    quantizer.reset()
    with pytest.raises(RuntimeError, match="no range yet"):
        quantizer(w)
    quantizer.initialize(w)
    assert torch.equal(quantizer(w), before)


@every_name
@every_bits
@every_weight
def test_packing_keeps_codes_and_values(name: str, bits: int, granularity: str):
    weight = weight_of()
    layer = nn.Linear(40, 6)
    layer.weight.data.copy_(weight)
    quantized = QuantLinear.from_float(layer, weight_quantizer(name, bits, granularity, weight), None)
    quantizer = quantized.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    alter(quantizer)
    packed = PackedLayer.from_quantized(quantized).eval()
    assert torch.equal(packed.codes(), quantizer.quantize(layer.weight))
    assert (packed.weight_offset is not None) == quantizer.has_offset
    assert packed.packed_weight.numel() == (weight.numel() * bits + 7) // 8
    assert torch.equal(packed.quantized_weight(), quantizer(layer.weight))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    assert_close(packed(x), quantized(x))

    loaded = PackedLayer.skeleton(quantized)
    loaded.load_state_dict(packed.state_dict())
    assert torch.equal(loaded.quantized_weight(), quantizer(layer.weight))


@every_name
@every_dtype
@pytest.mark.parametrize("bits", [4, 8], ids=lambda b: f"{b}bit")
def test_packing_keeps_low_precision_convolutions(name: str, dtype: torch.dtype, bits: int):
    layer = nn.Conv2d(3, 6, 3, dtype=dtype)
    layer.weight.data.copy_(torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1)
    quantizer = quantizer_class(name)(QuantizerSettings(bits, role="weight", scale_shape=(6, 1, 1, 1)))
    quantizer.initialize(layer.weight)
    quantized = QuantConv2d.from_float(layer, quantizer, None)
    w_q = quantized.quantized_weight()
    assert w_q.dtype == dtype
    packed = PackedLayer.from_quantized(quantized)
    assert torch.equal(packed.quantized_weight(), w_q)
    w_q.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in quantizer.parameters())


@every_name
@every_weight
@every_dtype
@pytest.mark.parametrize("value", [0.0, 0.7], ids=["zeros", "constant"])
def test_constant_weights_stay_finite(name: str, granularity: str, dtype: torch.dtype, value: float):
    w = torch.full((6, 40), value, dtype=dtype, requires_grad=True)
    quantizer = weight_quantizer(name, 4, granularity, w, "mse")
    w_q = quantizer(w)
    assert_close(w_q, w.detach(), rtol=0.01, atol=1e-6)
    w_q.sum().backward()
    assert w.grad is not None and torch.isfinite(w.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in quantizer.parameters() if p.grad is not None)


@every_name
def test_one_weight_per_channel(name: str):
    """A depthwise 1x1 convolution: no standard deviation, no neighbours."""
    w = torch.tensor([0.3, -0.2, 0.0, 4.0, -1e-3, 0.5])[:, None]
    quantizer = weight_quantizer(name, 8, "channel", w, "mse")
    assert_close(quantizer(w), w, rtol=0.01, atol=1e-6)


@every_name
@pytest.mark.parametrize("value", [0.0, -1.0], ids=["zero", "negative"])
def test_a_learned_value_pushed_below_zero_can_come_back(name: str, value: float):
    w = weight_of().requires_grad_()
    quantizer = weight_quantizer(name, 4, "tensor", w)
    learned = next(iter(quantizer.parameters()))
    with torch.no_grad():
        learned.fill_(value)
    w_q = quantizer(w)
    assert torch.isfinite(w_q).all()
    scale, _ = quantizer.grid(w)
    assert (scale > 0).all()
    (w_q - w.detach()).square().sum().backward()
    assert learned.grad is not None and (learned.grad < 0).all()  # descent makes it larger


@every_name
@every_activation
def test_autocast_types_pass_through(name: str, signed: bool | None, data: str):
    x = activation_of(data)
    quantizer = activation_quantizer(name, 4, signed, x)
    x_q = quantizer(x.bfloat16())
    assert x_q.dtype == torch.bfloat16
    step = quantizer.grid()[0].item()
    assert (x_q.float() - quantizer(x)).abs().mean() < 0.05 * step + 0.01 * x.abs().mean()


@every_name
@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(name: str, bits: int):
    with pytest.raises(ValueError, match=rf"bits={bits}; expected an integer from 2 to 8"):
        quantizer_class(name)(QuantizerSettings(bits, role="weight"))


@every_name
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_range_from_values_that_are_not_finite(name: str, bad: float):
    quantizer = quantizer_class(name)(QuantizerSettings(4, role="weight"))
    quantizer.path = "layer.weight_quantizer"
    with pytest.raises(ValueError, match="layer.weight_quantizer: cannot fit a range to infinite or NaN values"):
        quantizer.initialize(torch.tensor([1.0, bad]))


@every_name
def test_a_fit_that_fails_changes_nothing(name: str):
    """Neither passes what has no range for calibrated, nor does a range get lost: a weight of another shape fits no
    scale of each channel."""
    w = weight_of()
    fresh, fitted = (quantizer_class(name)(QuantizerSettings(4, "weight", scale_shape=(len(w), 1))) for _ in range(2))
    fitted.initialize(w)
    before = fitted(w)
    for quantizer in (fresh, fitted):
        with pytest.raises(RuntimeError):
            quantizer.initialize(torch.randn(len(w) + 1, 5))
    assert torch.equal(fitted(w), before)
    assert not fresh.initialized and all(p.isnan().all() for p in fresh.parameters())
    with pytest.raises(RuntimeError, match="no range yet"):
        fresh(w)


@every_name
def test_double_precision_is_kept(name: str):
    w = weight_of(dtype=torch.float64)
    quantizer = quantizer_class(name)(QuantizerSettings(4, role="weight")).double()
    quantizer.initialize(w)
    assert quantizer(w).dtype == torch.float64


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="quantizer='lsqq' is unknown; expected one of .*'lsq_plus'"):
        quantizer_class("lsqq")

"""Weights that a quantizer has put on its grid, as floats (`dequantize`), given to a new one of the same kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_saq.quantizers import Quantizer, QuantizerSettings, mean_and_std, quantizer_class

SHAPES = {"tensor": (1,), "channel": (48, 1)}
every_granularity = pytest.mark.parametrize("granularity", SHAPES)
every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 6, 8], ids=lambda b: f"{b}bit")


def twice(
    name: str, bits: int, granularity: str, largest: float = 0.15
) -> tuple[Quantizer, Tensor, Quantizer, Tensor]:
    """Quantize a weight with a grid as training leaves it, then the result, with the first grid of a new quantizer."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[granularity]
    w = torch.randn(48, 60, generator=generator) * (torch.rand(48, 1, generator=generator) + 0.3)
    w = w / w.abs().amax(dim=None if granularity == "tensor" else 1, keepdim=True) * largest + 0.004
    first, second = (quantizer_class(name)(QuantizerSettings(bits, "weight", scale_shape=shape)) for _ in range(2))
    first.initialize(w)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(torch.rand(shape, generator=generator) * 0.3 + 0.85)
        if name in ("dorefa", "pact"):  # the largest weight is on the outermost level
            first.clip_value.clamp_(max=largest)
        w_q = first(w)
    second.initialize(w_q)
    return first, w, second, w_q


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "dorefa", "pact"])
@every_bits
@every_granularity
def test_codes_and_values_are_kept(name: str, bits: int, granularity: str):
    first, w, second, w_q = twice(name, bits, granularity)
    assert_close(second(w_q), w_q, rtol=1e-5, atol=1e-6)
    if name in ("dorefa", "pact"):  # the others may find a coarser grid of the same values
        assert torch.equal(second.quantize(w_q), first.quantize(w))


@every_bits
@every_granularity
def test_liq_keeps_codes_and_moves_values_as_far_as_their_mean_had_moved(bits: int, granularity: str):
    first, w, second, w_q = twice("liq", bits, granularity)
    shape = SHAPES[granularity]
    moved = (mean_and_std(w_q, shape)[0] - mean_and_std(w, shape)[0]).abs()
    little = moved < 0.1 * first.grid(w)[0]
    assert little.float().mean() > 0.6
    assert ((second.quantize(w_q) == first.quantize(w)) | ~little).all()
    assert (((second(w_q) - w_q).abs() <= 1.5 * moved + 1e-6) | ~little).all()


@pytest.mark.parametrize(("bits", "largest"), [(6, 2.0), (7, 0.24), (8, 0.17)])
@every_granularity
def test_dorefa_keeps_a_grid_as_far_as_its_tanh_lets_it(bits: int, largest: float, granularity: str):
    first, w, second, w_q = twice("dorefa", bits, granularity, largest)
    assert torch.equal(second.quantize(w_q), first.quantize(w))


@every_granularity
def test_beyond_that_dorefa_moves_codes_by_one(granularity: str):
    first, w, second, w_q = twice("dorefa", 8, granularity, 2.0)
    moved = (second.quantize(w_q) - first.quantize(w)).abs()
    assert moved.max() == 1 and (moved > 0).float().mean() > 0.1

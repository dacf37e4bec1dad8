"""The search of the step size with the least squared error, against exhaustive search and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from hf_saq.quantizers.scale_search import QUANTILES, mse_range, mse_scale


def squared_error(x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Of each row, written out plainly in float64."""
    x, scale = x.double(), scale.double()
    return ((torch.clamp(torch.round(x / scale), qmin, qmax) * scale - x) ** 2).sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("bits", "excess"), [(2, 0.005), (3, 0.005), (4, 0.01), (8, 0.08)])
def test_is_nearly_as_good_as_an_exhaustive_search(bits, excess):
    torch.manual_seed(0)
    x = torch.randn(5, 400)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = squared_error(x, mse_scale(x, (5, 1), qmin, qmax), qmin, qmax)
    largest = x.abs().amax(dim=1, keepdim=True)
    every = torch.stack([squared_error(x, largest * k / 4000 / qmax, qmin, qmax) for k in range(1, 4001)])
    assert (found <= every.amin(dim=0) * (1 + excess)).all()


@pytest.mark.parametrize("shape", [(1,), (24, 1, 1, 1)], ids=["tensor", "channel"])
def test_values_on_a_grid_keep_it(shape):
    """Also where a channel uses a few codes only, so that its own largest value would suggest a finer step."""
    torch.manual_seed(0)
    codes = torch.randint(-60, 61, (24, 3, 3, 3))
    x = codes.float() * 0.0371
    scale = mse_scale(x, shape, -128, 127)
    assert_close((x / scale).round() * scale, x, atol=1e-6, rtol=0)
    assert_close(scale, torch.full(shape, 0.0371), atol=1e-7, rtol=0)


def test_a_coarse_copy_of_a_grid_is_one():
    """4-bit values looked at with 8 bits lose nothing."""
    x = torch.tensor([-8.0, -3.0, 0.0, 1.0, 7.0]) * 0.3
    scale = mse_scale(x, (1,), -128, 127)
    assert_close((x / scale).round() * scale, x)


def test_quantiles_stand_for_very_many_values():
    torch.manual_seed(0)
    x = torch.randn(4 * QUANTILES)
    some = mse_scale(x, (1,), -8, 7)
    every = mse_scale(x.view(1, -1).repeat(2, 1), (2, 1), -8, 7)  # two rows: no thinning out
    assert_close(some, every[:1, 0], rtol=0.01, atol=0)
    low, high = mse_range(x, 16)
    again = mse_range(x[torch.randperm(len(x))], 16)
    assert_close((low, high), again)


def test_rare_large_values_count_as_much_as_they_weigh():
    """Three in ten thousand values at 6, the others below 1: clipping at 1 costs more than it saves."""
    torch.manual_seed(0)
    x = torch.rand(8 * QUANTILES)
    x[: int(3e-4 * len(x))] = 6.0
    scale = mse_scale(x, (1,), 0, 255)
    assert scale.item() * 255 == pytest.approx(6.0, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_channel_on_a_grid_of_its_own_is_kept(bits: int):
    """Steps as training leaves them, none of which the search over clipping points would propose."""
    generator = torch.Generator().manual_seed(0)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = torch.rand(266, 1, generator=generator) + 0.1
    w = (torch.randn(266, 40, generator=generator) * 2 ** (bits - 2)).round().clamp(qmin, qmax) * steps
    scale = mse_scale(w, (266, 1), qmin, qmax)
    assert_close((w / scale).round().clamp(qmin, qmax) * scale, w, rtol=1e-5, atol=1e-6)

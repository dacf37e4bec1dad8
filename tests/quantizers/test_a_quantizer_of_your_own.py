"""A quantizer that this package does not know: what is handed to it, and that it may have nothing to learn."""

from __future__ import annotations

import pytest
import torch
from labelled_models import labelled_vectors, quantized_linear_net
from own_quantizer import PowerOfTwo
from torch import Tensor

from hf_saq.analysis import sensitivity
from hf_saq.quantizers import QUANTIZERS, QuantizerSettings, mse_scale


def test_other_bits_are_tried_of_a_quantizer_that_learns_nothing(monkeypatch):
    """The type of its parameters was asked for, and it has none: `StopIteration`."""
    monkeypatch.setitem(QUANTIZERS, "power_of_two", PowerOfTwo)
    net = quantized_linear_net(4, 4, quantizer="power_of_two")
    found = sensitivity(net, labelled_vectors(), candidates=(2, 4), trace_samples=2)
    fresh = quantized_linear_net(2, None, quantizer="power_of_two")
    noise = (fresh[0].quantized_weight() - net[0].weight).square().sum()
    assert noise > (net[0].quantized_weight() - net[0].weight).square().sum()
    assert found.entry("0", "weight", 2).snr < found.entry("0", "weight", 4).snr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_come_in_float32(dtype: torch.dtype):
    """A search of the least error among numbers of three digits is off by several percent of a step."""
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).to(dtype)

    class Searching(PowerOfTwo):
        def fit(self, x: Tensor) -> None:
            self.scale.copy_(mse_scale(x, self.scale_shape, self.qmin, self.qmax))

    quantizer = Searching(QuantizerSettings(4, "weight"))
    quantizer.initialize(weight)
    assert quantizer.scale.item() == mse_scale(weight.float(), (1,), -8, 7).item()

"""Constant calibration data is named; samples stay of one size however long the data."""

from __future__ import annotations

import pytest
import torch
from minimizer_nets import linear_net

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.conversion import observers
from hf_saq.conversion.observers import ActivationObserver


@pytest.mark.parametrize("value", [0.0, -2.1], ids=["zeros", "black"])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus"])
def test_constant_inputs_are_named(value: float, quantizer: str):
    net = quantize(linear_net(), SAQQuantizationConfig(quantizer=quantizer))
    with pytest.warns(UserWarning, match=rf"quantizers saw a single value .*0\.activation_quantizer \({value:g}\)"):
        calibrate(net, [torch.full((8, 12), value)] * 2)


def test_a_few_batches_are_kept_whole():
    observer, batches = ActivationObserver("q"), [torch.randn(50) for _ in range(4)]
    for batch in batches:
        observer.update(batch)
    assert torch.equal(torch.cat(observer.samples), torch.cat(batches))


def test_the_sample_has_a_fixed_size_and_is_fair(monkeypatch):
    monkeypatch.setattr(observers, "SAMPLES", 2000)
    observer = ActivationObserver("q")
    for k in range(10):
        observer.update(torch.full((700,), float(k)))
    sample = torch.cat(observer.samples)
    assert len(sample) == 2000 and observer.offered == 7000
    shares = torch.bincount(sample.long(), minlength=10) / 2000
    assert (shares - 0.1).abs().max() < 0.03  # a standard deviation is below 0.007

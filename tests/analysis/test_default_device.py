"""Users set torch's default device once, `torch.set_default_device("cuda")`, whatever model and data are on."""

from __future__ import annotations

import torch
from minimizer_nets import batch, linear_net, quantized, two_passes

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.analysis import landscape, sharpness
from hf_saq.conversion.observing import observers


def test_random_samples_and_directions_are_drawn_where_their_generators_are(monkeypatch):
    """The meta device stands for any that is neither the model's nor the generators'."""
    monkeypatch.setattr(observers, "SAMPLES_PER_BATCH", 64)
    monkeypatch.setattr(observers, "SAMPLES", 100)
    data, measured = batch(linear_net()), dict(rho=0.1, random_directions=1, power_iterations=1, trace_samples=2)
    expected = quantized(linear_net)
    rises = sharpness(expected, [data], **measured)
    surface = landscape(expected, [data], points=3)
    two_passes(expected, SharpnessAwareMinimizer(expected, rho=0.1), data)
    net = linear_net()
    with torch.device("meta"):
        config = SAQQuantizationConfig(weight_bits=3, activation_bits=3, first_last_bits=None)
        calibrate(quantize(net, config), [data[0]]).train()
        assert sharpness(net, [data], **measured) == rises
        assert landscape(net, [data], points=3).surfaces == surface.surfaces
        two_passes(net, SharpnessAwareMinimizer(net, rho=0.1), data)
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)

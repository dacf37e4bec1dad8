"""Oscillations against a plain loop over the codes of a weight."""

from __future__ import annotations

import pytest
import torch
from labelled_models import quantized_linear_net
from tiny_models import linear_net

from hf_saq.analysis import OscillationCounter


def test_frequencies_are_those_of_a_plain_loop():
    """Weight by weight, as in arXiv:2203.11086; shares are exact."""
    net = quantized_linear_net(3)
    counter = OscillationCounter(net, momentum=0.3, threshold=0.25)
    assert counter.summary() == {}
    generator = torch.Generator().manual_seed(0)

    def codes() -> list[list[int]]:
        return [net[k].weight_quantizer.quantize(net[k].weight).flatten().tolist() for k in (0, 2, 4)]

    history = [codes()]
    for _ in range(12):
        for k in (0, 2, 4):
            noise = torch.randn(net[k].weight.shape, generator=generator)
            net[k].weight.data += 0.7 * net[k].weight_quantizer.scale.item() * noise
        counter.update()
        history.append(codes())
    oscillating, changed, total = [], 0, 0
    for layer in range(3):
        above = []
        for track in zip(*(step[layer] for step in history), strict=True):
            frequency, last = 0.0, 0
            for before, now in zip(track, track[1:], strict=False):
                turned = now != before and last * (now - before) < 0
                frequency = 0.3 * turned + 0.7 * frequency
                last = now - before or last
            above.append(frequency > 0.25)
            changed += track[-1] != track[-2]
            total += 1
        oscillating.append(above)
    assert counter.oscillating() == {
        name: pytest.approx(sum(above) / len(above)) for name, above in zip("024", oscillating, strict=True)
    }
    assert counter.summary() == pytest.approx(
        {"oscillating_weights": sum(map(sum, oscillating)) / total, "changed_codes": changed / total}
    )
    assert 0.1 < counter.summary()["oscillating_weights"] < 0.9


def test_a_drift_is_no_oscillation_and_a_flip_is():
    net = quantized_linear_net(4)
    weight, step = net[2].weight.data, net[2].weight_quantizer.scale.item()
    weight.zero_()
    net[0].weight.data.zero_()
    counter = OscillationCounter(net, momentum=1.0)
    for k in range(1, 6):
        weight[0] = k * step  # one way
        weight[1] = (k % 2) * step  # there and back
        counter.update()
        assert counter.oscillating()["2"] == (1 / 8 if k > 1 else 0)
    assert counter.oscillating()["0"] == 0
    assert counter.summary()["changed_codes"] == 16 / (48 + 64 + 24)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"Sequential has no quantized weight; expected a model made by `quantize`"):
        OscillationCounter(linear_net())
    with pytest.raises(ValueError, match=r"momentum=0, threshold=0.005; expected \(0, 1\] and \[0, 1\)"):
        OscillationCounter(quantized_linear_net(), momentum=0)

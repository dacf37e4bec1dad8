"""Losses and scores that are NaN, infinite or of few digits: named, and no numbers where there are none."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from labelled_models import labelled_vectors, nothing_changes, quantized_linear_net
from torch import nn

from hf_saq.analysis import allocate_bits, landscape, sensitivity, sharpness
from hf_saq.analysis.agreement import agreement, decibels

ANALYSES = {
    "sharpness": lambda net, batches: sharpness(net, batches, 0.1),
    "landscape": lambda net, batches: landscape({"a": net}, batches, points=3),
    "sensitivity": lambda net, batches: sensitivity(net, batches, candidates=(2,)),
    "allocate_bits": lambda net, batches: allocate_bits(net, batches, "0.8x", candidates=(2, 4)),
}


def diverged() -> nn.Module:
    net = quantized_linear_net()
    with torch.no_grad():
        net[4].bias[1] = math.inf
    return net


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_diverged_model_is_named(analysis: str):
    with (
        nothing_changes(net := diverged()),
        pytest.raises(ValueError, match=r"the loss of batch 0 is (nan|inf); expected"),
    ):
        ANALYSES[analysis](net, labelled_vectors())


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_are_told_of(analysis: str, dtype: torch.dtype):
    """A rise of a hundredth is less than a step between two numbers in bfloat16."""
    net, batches = quantized_linear_net().to(dtype), [(x.to(dtype), y) for x, y in labelled_vectors()]
    with pytest.warns(UserWarning, match=rf"has parameters in {dtype}, of two or three digits"):
        ANALYSES[analysis](net, batches)


def test_a_batch_with_nan_is_named():
    batches = labelled_vectors(batches=3)
    batches[1][0][2, 0] = math.nan
    with pytest.raises(ValueError, match=r"sharpness: the loss of batch 1 is nan; expected a finite number\. "):
        sharpness(quantized_linear_net(), batches, 0.1)


def test_a_radius_beyond_all_numbers_gives_no_number(tmp_path):
    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]).exp()

    found = sharpness(quantized_linear_net(), labelled_vectors(), 1e6, loss=loss, random_directions=2)
    assert math.isfinite(found.loss) and math.isnan(found.steepest.spread) and "nan over batches" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["steepest"]["spread"] is None
    found.plot(tmp_path / "sharpness.png")


@pytest.mark.parametrize(("by", "field"), [("noise", "snr"), ("measured", "loss_rise"), ("estimated", "estimate")])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_bits_that_overflow_are_not_chosen_from(by, field, value):
    net, batches = quantized_linear_net(), labelled_vectors()
    found = sensitivity(net, batches, candidates=(2, 4))
    entries = [replace(e, **{field: value}) if (e.name, e.bits) == ("2", 2) else e for e in found.entries]
    message = r"2 has no estimate for its weight" if (by, value != value) == ("estimated", True) else r"2 bits for the"
    with pytest.raises(ValueError, match=message):
        allocate_bits(net, batches, "1x", candidates=(2, 4), by=by, found=replace(found, entries=tuple(entries)))


def test_scores_that_are_nan_agree_with_nothing():
    scores = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, 0.0]])
    assert agreement([scores], [scores]) == pytest.approx(2 / 3)
    assert agreement([scores[:2], scores[2:]], [torch.zeros(2, 2), scores[2:]]) == pytest.approx(1 / 3)
    windows = torch.stack([scores, scores.flip(0)], dim=2)  # (3, 2, 2): classes in dimension 1
    assert agreement([windows], [windows]) == pytest.approx(4 / 6)


def test_decibels():
    assert decibels(100.0, 1.0) == pytest.approx(20) and decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == decibels(1.0, math.inf) == decibels(1e-320, 1e300) == -math.inf
    assert all(math.isnan(decibels(*pair)) for pair in ((math.nan, 1.0), (math.nan, 0.0), (math.inf, math.inf)))

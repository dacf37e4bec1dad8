"""The first samples of a batch of any structure."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from transformers import BatchFeature

from hf_saq.sharpness.schedules.partial_batch import batch_size, first_samples

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(8, 0.25, 2), (10, 0.3, 3), (10, 0.31, 4), (10, 0.7, 7), (3, 0.01, 2), (8, 0.125, 2), (1, 0.5, 1), (5, 1.0, 5)],
)
def test_the_first_samples_of_any_structure(size, fraction, count):
    x, y = torch.randn(size, 3, 4), torch.arange(size)
    weights, name = torch.randn(13), "batch"
    for batch in (
        {"pixel_values": x, "labels": y, "weights": weights, "name": name},
        BatchFeature({"pixel_values": x, "labels": y}),
        (x, y),
        [x, y],
        Pair(x, y),
        {"inputs": {"x": x}, "targets": [y, x]},
        x,
    ):
        part = first_samples(batch, fraction)
        assert type(part) is type(batch) and batch_size(batch) == size
        flat = torch.utils._pytree.tree_flatten(dict(part) if isinstance(part, BatchFeature) else part)[0]
        whole = torch.utils._pytree.tree_flatten(dict(batch) if isinstance(batch, BatchFeature) else batch)[0]
        assert len(flat) == len(whole)
        for a, b in zip(flat, whole, strict=True):
            assert a == b if isinstance(b, str) else torch.equal(a, b if b is weights else b[:count])


@pytest.mark.parametrize("batch", [{"labels": [1, 2]}, {"scale": torch.tensor(1.0)}, "image", []])
def test_a_batch_without_samples_is_refused(batch):
    with pytest.raises(ValueError, match="ascent_fraction: the batch is a .* no tensor has a batch dimension"):
        first_samples(batch, 0.5)

"""Parts of batches: what is one entry a sample is told by structure, and left alone where it is not beyond doubt."""

from __future__ import annotations

import re
from collections import namedtuple

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from hf_saq.sharpness.schedules.partial_batch import count_samples, first_samples, part_size, share_of_samples

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(8, 0.25, 2), (10, 0.3, 4), (10, 0.31, 4), (10, 0.7, 8), (3, 0.01, 2), (8, 0.125, 2), (1, 0.5, 1), (5, 1.0, 5)],
)
def test_the_first_samples_of_any_structure(size, fraction, count):
    x, y = torch.randn(size, 3, 4), torch.arange(size)
    names, weights = [f"{k}.png" for k in range(size)], np.arange(size) / 2
    boxes = [{"boxes": torch.randn(k, 4)} for k in range(size)]
    for batch in (
        {"pixel_values": x, "labels": y, "temperature": torch.tensor(2.0), "name": "batch", "nothing": None},
        {"pixel_values": x, "labels": boxes, "names": names, "weights": weights},
        BatchFeature({"pixel_values": x, "labels": y}),
        (x, y),
        [x, y],
        (x, boxes),
        Pair(x, y),
        {"inputs": {"x": x}, "targets": (y, x, y)} if size != 3 else (x, y),
        x,
    ):
        part = first_samples(batch, fraction)
        assert type(part) is type(batch) and count_samples(batch).size == size
        assert count_samples(part).size == part_size(size, fraction) == count
        assert_is_part(part, batch, size, count)


def assert_is_part(part, whole, size: int, count: int) -> None:
    """Compare value by value; written anew rather than with the rules of the package."""
    if isinstance(whole, (dict, BatchFeature)):
        assert list(part) == list(whole)
        for name in whole:
            assert_is_part(part[name], whole[name], size, count)
    elif isinstance(whole, (torch.Tensor, np.ndarray)):
        expected = whole[:count] if whole.ndim else whole
        assert type(part) is type(whole) and part.shape == expected.shape and bool((part == expected).all())
    elif isinstance(whole, list) and len(whole) == size and not isinstance(whole[0], torch.Tensor):
        assert len(part) == count and all(a is b for a, b in zip(part, whole[:count], strict=True))
    elif isinstance(whole, (list, tuple)):
        for a, b in zip(part, whole, strict=True):
            assert_is_part(a, b, size, count)
    else:
        assert part is whole


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"labels": [1, 2]}, "no tensor in this dict of .* has a batch dimension"),
        ({"scale": torch.tensor(1.0)}, "no tensor"),
        ("image", "no tensor in this str"),
        ([], "no tensor"),
        ({"x": torch.zeros(8, 3, 4, 4), "class_weights": torch.zeros(5)}, r"class_weights.* has 5 entries .* have 8"),
        ({"x": torch.zeros(8, 3, 4, 4), "boxes": torch.zeros(21, 4)}, "boxes.* has 21 entries"),
        ({"x": torch.zeros(8, 3, 4, 4), "names": ["a", "b"]}, ""),
        ([torch.zeros(3, 4, 4)] * 8, "a list of 8 alike tensors may be a list of samples"),
        ((torch.zeros(8, 3, 4, 4), torch.zeros(4)), "has 4 entries where others have 8"),
        ({"crops": [torch.zeros(8, 3, 4, 4)] * 8, "y": torch.zeros(8)}, "crops.* may have 8 views of 8 samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_batch_that_cannot_be_split_without_doubt_stays_whole(batch, reason):
    found = count_samples(batch)
    if reason:
        assert found.size is None
        assert re.search(reason, found.reason)
        assert first_samples(batch, 0.5) is batch and share_of_samples([batch], 0.5) == 1
    else:  # a list of something else than one entry a sample
        assert first_samples(batch, 0.5)["names"] == batch["names"]


def test_named_values_alone_are_split():
    """A value for each of 8 classes looks like one for each of 8 samples: where names are known, they decide."""
    batch = {"pixel_values": torch.zeros(8, 3, 4, 4), "labels": torch.zeros(8), "class_weights": torch.zeros(8)}
    assert count_samples(batch).size == 8
    found = count_samples(batch, {"pixel_values", "labels"})
    assert found.size is None and "whether class_weights has one entry a sample is not known" in found.reason
    assert first_samples(batch, 0.25, {"pixel_values", "labels"}) is batch


def test_the_share_of_batches_that_climb_together():
    batches = [{"x": torch.zeros(n, 3)} for n in (8, 8, 3)]
    assert share_of_samples(batches, 0.25) == (2 + 2 + 2) / 19

"""The first samples of a batch of any structure."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .knobs import ceil_of_product

MINIMUM = 2
"""Samples: a batch norm behind global pooling has no statistics of a single one, and torch refuses it."""


def first_samples(batch: Any, fraction: float) -> Any:
    """The first `ceil(fraction * n)` of the `n` samples of `batch`, at least two; the batch itself if these are all.

    `n` is the length of dimension 0 that most tensors in `batch` have. Every tensor of that length is sliced (a view),
    anything else is kept as it is, in the same structure of tuples, lists and mappings.

    Raises:
        ValueError: If no tensor in `batch` has a dimension 0.
    """
    size = batch_size(batch)
    count = part_size(size, fraction)
    return batch if count == size else _sliced(batch, size, count)


def part_size(size: int, fraction: float) -> int:
    """Count the samples that a part of a batch of `size` samples has."""
    return min(max(ceil_of_product(fraction, size), MINIMUM), size)


def share_of_samples(batches: Iterable[Any], fraction: float) -> float:
    """Compute the share of all samples of `batches` that are in their parts."""
    sizes = [batch_size(batch) for batch in batches]
    return sum(part_size(size, fraction) for size in sizes) / max(sum(sizes), 1)


def batch_size(batch: Any) -> int:
    """The length of dimension 0 that most tensors in `batch` have, of the first one where several are as frequent."""
    lengths = Counter(tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim > 0)
    if not lengths:
        held = list(batch) if isinstance(batch, Mapping) else batch
        raise ValueError(
            f"ascent_fraction: the batch is a {type(batch).__name__} of {held!r}, in which no tensor has a batch "
            "dimension to take a part of. Collate samples into tensors, or set ascent_fraction=1."
        )
    return lengths.most_common(1)[0][0]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _sliced(batch: Any, size: int, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:count] if batch.ndim > 0 and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        part: Any = copy.copy(batch)  # a `BatchEncoding` stays one
        for name, value in batch.items():
            part[name] = _sliced(value, size, count)
        return part
    if isinstance(batch, (list, tuple)):
        values = [_sliced(value, size, count) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch

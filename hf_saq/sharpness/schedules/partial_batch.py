"""Take the first samples of a batch, where its structure says without doubt what a sample is.

A batch is a mapping, a tuple or list, or one tensor. Each value in it is one of three things:

- one entry a sample: a tensor, an array, or a list, all of the same length, which is the size of the batch;
- a structure of such values: a mapping, or a list or tuple that holds some of that length;
- shared by all samples: a number, a string, `None`, a tensor without dimensions.

Anything else, a tensor of another length for example, may be one value a class as well as one value a sample of a
packed batch. A part of such a batch cannot be taken without knowing what its loss does with it, so it is used whole.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .knobs import ceil_of_product

MINIMUM = 2
"""Smallest number of samples in a part: a batch norm behind global pooling has no statistics of a single sample, and
torch refuses it. Parts have even numbers of samples, because code that mixes pairs of images (mixup) refuses odd ones.
"""


class Samples(NamedTuple):
    """Holds the number of samples in a batch, or the reason why no part of the batch can be taken."""

    size: int | None
    reason: str = ""


def count_samples(batch: Any, names: Collection[str] | None = None) -> Samples:
    """Find the number of samples in a batch.

    Args:
        names: If given, the keys of a mapping whose values have one entry a sample; other keys are doubtful.
    """
    if names is not None and isinstance(batch, Mapping):
        unknown = [str(name) for name, value in batch.items() if name not in names and not _is_shared(value)]
        if unknown:
            return Samples(None, f"whether {', '.join(unknown)} has one entry a sample is not known")
    if isinstance(batch, (list, tuple)) and _could_be_samples_themselves(batch):
        return Samples(None, f"a {type(batch).__name__} of {len(batch)} alike tensors may be a list of samples")
    tensors = list(_tensors(batch))
    if not tensors:
        held = list(batch) if isinstance(batch, Mapping) else batch
        return Samples(None, f"no tensor in this {type(batch).__name__} of {held!r:.80} has a batch dimension")
    size = max(tensors, key=lambda tensor: tensor.ndim).shape[0]  # images have the most dimensions
    doubtful = _doubtful(batch, size, "")
    return Samples(None, doubtful) if doubtful else Samples(size)


def first_samples(batch: Any, fraction: float, names: Collection[str] | None = None) -> Any:
    """Take the first samples of `batch`, as many as [`part_size`] says.

    Returns:
        The samples in the structure of `batch`, tensors as views; `batch` itself if these are all samples, or if no
        part of it can be taken.
    """
    size, _ = count_samples(batch, names)
    if size is None or part_size(size, fraction) == size:
        return batch
    return _sliced(batch, size, part_size(size, fraction))


def part_size(size: int, fraction: float) -> int:
    """Count the samples in a part of a batch of `size`: `fraction` of them, even, at least `MINIMUM`, at most all."""
    count = max(ceil_of_product(fraction, size), MINIMUM)
    return min(count + count % 2, size)


def share_of_samples(batches: Iterable[Any], fraction: float, names: Collection[str] | None = None) -> float:
    """Compute the share of the samples of `batches` that are in their parts, in (0, 1]."""
    sizes = [count_samples(batch, names).size for batch in batches]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or sum(known) == 0:
        return 1.0
    return sum(part_size(size, fraction) for size in known) / sum(known)


def _is_shared(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return not isinstance(value, (Mapping, list, tuple))


def _could_be_samples_themselves(batch: list | tuple) -> bool:
    """Tell whether the entries may be samples, such as images of one shape: slicing them would cut samples."""
    if len(batch) < 2 or not all(isinstance(value, Tensor) for value in batch):
        return False
    return len({value.shape for value in batch}) == 1 and batch[0].ndim > 2


def _tensors(batch: Any) -> Iterable[Tensor | np.ndarray]:
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim > 0:
            yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _doubtful(value: Any, size: int, where: str) -> str:
    """Say what in `value` has neither one entry for each of `size` samples nor is shared; `""` if nothing."""
    if _is_shared(value):
        return ""
    if isinstance(value, (Tensor, np.ndarray)):
        found = f"{where or 'a tensor'} has {value.shape[0]} entries where others have {size}"
        return "" if value.shape[0] == size else found
    if where and isinstance(value, (list, tuple)) and len(value) == size:
        # Each entry is that of a sample, of whatever kind, or there are as many crops of all samples by chance.
        could_be_crops = size > 1 and all(isinstance(v, Tensor) and v.ndim > 1 and len(v) == size for v in value)
        return f"{where} may have {size} views of {size} samples or one entry a sample" if could_be_crops else ""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    doubts = (_doubtful(inner, size, f"{where}[{key!r}]") for key, inner in items)
    return next((doubt for doubt in doubts if doubt), "")


def _sliced(value: Any, size: int, count: int, is_top: bool = True) -> Any:
    if _is_shared(value):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return value[:count]
    if isinstance(value, Mapping):
        part: Any = copy.copy(value)  # a `BatchEncoding` stays one
        for name, inner in value.items():
            part[name] = _sliced(inner, size, count, is_top=False)
        return part
    if not is_top and len(value) == size:
        return value[:count]
    values = [_sliced(inner, size, count, is_top=False) for inner in value]
    return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)

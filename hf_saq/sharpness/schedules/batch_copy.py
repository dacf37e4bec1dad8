"""Copy a batch, so that what a pass changes in it in place is not found changed by the next pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def copied(batch: Any) -> Any:
    """Copy the tensors and arrays of `batch` in its structure of mappings, lists and tuples.

    A loss may mix images in their own memory (Mixup of timm does), normalize them there, or ask for their gradient.

    Returns:
        The copy. Tensors that hang at a graph, and objects of other types, are those of `batch`.
    """
    if isinstance(batch, Tensor):
        return batch if batch.grad_fn is not None else batch.detach().clone().requires_grad_(batch.requires_grad)
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, Mapping):
        made: Any = copy.copy(batch)  # a `BatchEncoding` stays one
        for name, value in batch.items():
            made[name] = copied(value)
        return made
    if isinstance(batch, (list, tuple)):
        values = [copied(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch

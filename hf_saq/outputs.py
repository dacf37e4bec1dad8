"""Find the logits in what a classifier returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def logits_of(output: Any, may_be_first: bool = False) -> Tensor:
    """Take the logits: `output` is that tensor, or has it as `logits`, as outputs of transformers do.

    Args:
        may_be_first: Whether they may also be the first of several values, as where `return_dict=False`.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if may_be_first and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    raise ValueError(
        f"the model returns a {type(output).__name__} without `logits`; expected a classifier, which returns a "
        f"tensor or an output with `logits`{', or a tuple that begins with them' if may_be_first else ''}."
    )


def class_axis(dimensions: int) -> int:
    """Return the axis of classes in logits: `(n, classes)`, maps `(n, classes, H, W)` or `(n, queries, classes)`."""
    return 1 if dimensions == 4 else -1

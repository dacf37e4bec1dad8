"""Remove attention masks that mask nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from .nodes import constant, nodes_of, producer, replace_value


def drop_open_masks(model: Any) -> int:
    """Remove each sum with a mask that is zero wherever its condition holds, which is everywhere; changes no result.

    Models of transformers write such a mask where they attend to all patches, and add it in every layer.

    Returns:
        How many sums were removed.
    """
    count = 0
    for node in nodes_of(model, "Add"):
        for mask, scores in (node.inputs, reversed(node.inputs)):
            if _is_open(mask):
                replace_value(node.outputs[0], scores)
                count += 1
                break
    return count


def _is_open(value: Any) -> bool:
    """Tell whether `value` is a `Where` of zero, whose condition is true everywhere."""
    where = producer(value, "Where")
    if where is None:
        return False
    condition, chosen = where.inputs[0], constant(where.inputs[1])
    expand = producer(condition, "Expand")
    holds = constant(condition if expand is None else expand.inputs[0])
    is_true = holds is not None and holds.dtype == np.bool_ and holds.size > 0 and bool(holds.all())
    return is_true and chosen is not None and chosen.ndim == 0 and chosen == 0

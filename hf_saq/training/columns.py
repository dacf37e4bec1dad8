"""Columns of a data set that its transform needs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


class KeepsColumnsOfTransforms(Trainer):
    """Leaves the columns of a data set alone that makes its model inputs itself.

    `Trainer` removes columns that the model does not know. A data set with a transform (`with_transform`,
    `set_transform`) makes the inputs of the model from just such columns, and then ends in `KeyError: 'image'`.
    """

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if dataset.format["type"] == "custom":
            return dataset
        return super()._remove_unused_columns(dataset, description)

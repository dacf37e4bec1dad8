"""Keep the columns of a data set that its transform needs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


class KeepsColumnsOfTransforms(Trainer):
    """Keeps all columns of a data set that has a transform (`with_transform`, `set_transform`).

    `Trainer` removes columns that the model does not know. The transform makes the inputs of the model from just such
    columns, and would fail with `KeyError: 'image'`.
    """

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if dataset.format["type"] == "custom":
            return dataset
        return super()._remove_unused_columns(dataset, description)

"""Keep the columns of a data set that its transform needs, and say which ones do not fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from ..conversion.observing import check_keys


class KeepsColumnsOfTransforms(Trainer):
    """Keeps all columns of a data set that has a transform (`with_transform`, `set_transform`).

    `Trainer` removes columns that the model does not know. The transform makes the inputs of the model from just such
    columns, and would fail with `KeyError: 'image'`.
    """

    model: nn.Module
    _checked_keys: frozenset[str] = frozenset()
    """Keys of the batch that was compared with the model last."""

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if dataset.format["type"] == "custom":
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer` does.

        Raises:
            ValueError: If the keys of `inputs` do not fit the model.
        """
        # Leave out labels that the loss takes and the model does not see.
        apart = ("labels",) if self.compute_loss_func is not None or self.label_smoother is not None else ()
        self.check_inputs({name: value for name, value in inputs.items() if name not in apart})
        return super().compute_loss(model, inputs, *args, **kwargs)

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise `ValueError` if the keys of `inputs`, which the model is going to see, do not fit it."""
        if inputs.keys() != self._checked_keys:
            check_keys(self.accelerator.unwrap_model(self.model), inputs, type(self).__name__)
            self._checked_keys = frozenset(inputs)

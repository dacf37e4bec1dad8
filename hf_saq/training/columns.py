"""Keep the columns of a data set that its transform needs, and say what in its batches does not fit the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..conversion.observing import check_keys
from .calibrating import unchanged_rng

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label that the losses of torch leave out."""

UNNAMED = {0: "LABEL_0", 1: "LABEL_1"}
"""Classes in the configuration of a model that classifies nothing."""


def counted_labels(labels: Tensor, config: Any) -> Tensor:
    """Mark the labels that a loss counts, in the shape of `labels`: those that it does not ignore.

    Args:
        labels: Classes or tokens; `(N, height, width)` for segmentation, where models ignore a class of their own.
        config: Of the model, may be `None`.
    """
    counted = labels.ne(IGNORED)
    ignored = getattr(config, "semantic_loss_ignore_index", getattr(config, "loss_ignore_index", None))
    return counted & labels.ne(ignored) if labels.ndim > 2 and ignored is not None else counted


class KeepsColumnsOfTransforms(Trainer):
    """Keeps all columns of a data set that has a transform (`with_transform`, `set_transform`).

    `Trainer` removes columns that the model does not know. The transform makes the inputs of the model from just such
    columns, and would fail with `KeyError: 'image'`.
    """

    model: nn.Module
    _checked_keys: frozenset[str] = frozenset()
    """Keys of the batch that was compared with the model last."""

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if dataset.format["type"] != "custom":
            dataset = super()._remove_unused_columns(dataset, description)
        self._check_classes(dataset, description)
        return dataset

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer` does.

        Raises:
            ValueError: If the keys of `inputs` do not fit the model, or, on CPU, labels are not among its classes. (On
                a GPU only a data set that names its classes is compared with the model, as its loader is made.)
        """
        # Leave out labels that the loss takes and the model does not see.
        apart = ("labels",) if self.compute_loss_func is not None or self.label_smoother is not None else ()
        self.check_inputs({name: value for name, value in inputs.items() if name not in apart})
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        except IndexError as error:  # of a loss on CPU; on a GPU a failed assertion ends the process
            labels, classes = inputs.get("labels"), self._classes()
            if isinstance(labels, Tensor) and labels.device.type == "cpu" and classes is not None:
                counted = labels[counted_labels(labels, self._config())]
                wrong = counted[(counted >= classes) | (counted < 0)].tolist()
                if wrong:
                    raise ValueError(
                        f"{type(self).__name__}: a batch has the label {wrong[0]}; the model has {classes} classes "
                        f"and expects 0 to {classes - 1}. Build it with num_labels, or number the classes from 0."
                    ) from error
            raise

    def _classes(self) -> int | None:
        """Number of classes of a classifier of transformers; `None` for others, whatever their configurations say."""
        model, config = self.accelerator.unwrap_model(self.model), self._config()
        if getattr(config, "id2label", None) == UNNAMED and "Classification" not in type(model).__name__:
            return None
        takes_labels = "labels" in inspect.signature(model.forward).parameters or self.compute_loss_func is not None
        return getattr(config, "num_labels", None) if takes_labels else None

    def _config(self) -> Any:
        return getattr(self.accelerator.unwrap_model(self.model), "config", None)

    def _check_classes(self, dataset: Any, description: str | None) -> None:
        """Raise `ValueError` if a data set that names its classes has labels that the model has not, or numbers
        classes of the model otherwise: the model would learn to call each class by the name of another."""
        features, known = getattr(dataset, "features", None) or {}, self._classes()
        if known is None:
            return
        for name in ("label", "labels"):
            named = getattr(features.get(name), "num_classes", 0)
            # Read the labels only where they may be too large: a part of a data set keeps the names of all.
            largest = max(dataset.unique(name), default=0) if named > known and len(dataset) else 0
            if largest >= known and self._label_of_the_model(dataset, name, largest) >= known:
                raise ValueError(
                    f"{type(self).__name__}: the {description or 'given'} data set has {named} classes in {name!r} "
                    f"and labels up to {largest}; the model has {known} classes. Build it with num_labels={named}."
                )
            self._check_order(dataset, description, name, known)

    def _check_order(self, dataset: Any, description: str | None, name: str, known: int) -> None:
        classes = getattr((getattr(dataset, "features", None) or {}).get(name), "names", None) or []
        stored = getattr(self._config(), "id2label", None) or {}
        own = [str(stored.get(k)) for k in range(known)]
        other = [k for k, called in enumerate(classes) if k >= known or own[k] != called]
        if not other or not set(classes) <= set(own):
            return
        # Ask for the label of an image of such a class: the data set may have none.
        there = set(dataset.unique(name))
        k = next((k for k in other if k in there), None)
        if k is not None and self._label_of_the_model(dataset, name, k) == k:
            raise ValueError(
                f"{type(self).__name__}: the {description or 'given'} data set numbers classes of the model "
                f"otherwise: {classes[k]!r} is {k} in {name!r}, and {own.index(classes[k])} in the model's id2label, "
                "so that it would call each class by the name of another. Number the data as the model does, by "
                f"dataset.align_labels_with_mapping(model.config.label2id, {name!r}), or, where the model is to learn "
                "new numbers, set id2label and label2id in its configuration to those of the data."
            )

    def _label_of_the_model(self, dataset: Any, name: str, label: int) -> int:
        """Return the label that an image with `label` in the column `name` has when it leaves the collator; -1 if that
        is unknown.

        The transform of a data set, or the collator, may make other labels of those in its columns.
        """
        row = int((dataset.select_columns([name]).with_format("numpy")[:][name] == label).argmax())
        try:
            with unchanged_rng():
                twice = [dataset[row]] * 2  # for what mixes images
                labels = torch.as_tensor(self.data_collator(twice)["labels"])
        except Exception as error:  # it comes again where it is in the way
            logger.info("The labels of a data set are not compared with the model: %s", error)
            return -1
        return -1 if labels.is_floating_point() or not labels.numel() else int(labels.max())

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise `ValueError` if the keys of `inputs`, which the model is going to see, do not fit it."""
        if inputs.keys() != self._checked_keys:
            check_keys(self.accelerator.unwrap_model(self.model), inputs, type(self).__name__)
            self._checked_keys = frozenset(inputs)

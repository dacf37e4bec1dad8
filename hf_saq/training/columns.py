"""Keep the columns of a data set that its transform needs, and say what in its batches does not fit the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
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

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        self._check_folders(dataset, description)
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _check_classes(self, dataset: Any, description: str | None) -> None:
        """Raise `ValueError` if a data set that names its classes has labels that the model has not, or numbers
        classes of the model otherwise: the model would learn to call each class by the name of another."""
        features, known = getattr(dataset, "features", None) or {}, self._classes()
        if known is None:
            return

        def first_row(name: str, label: int) -> int:
            return int((dataset.select_columns([name]).with_format("numpy")[:][name] == label).argmax())

        for name in ("label", "labels"):
            named, where = getattr(features.get(name), "num_classes", 0), f"in {name!r}"
            # Read the labels only where they may be too large: a part of a data set keeps the names of all.
            largest = max(dataset.unique(name), default=0) if named > known and len(dataset) else 0
            if largest >= known and self._label_in_batch(dataset, first_row(name, largest)) >= known:
                raise ValueError(self._more_classes(description, named, where, largest, known))
            classes = getattr(features.get(name), "names", None) or []
            k = self._numbered_otherwise(classes, known, lambda name=name: dataset.unique(name))  # type: ignore[misc]
            if k is not None and self._label_in_batch(dataset, first_row(name, k)) == k:
                how = f"dataset.align_labels_with_mapping(model.config.label2id, {name!r})"
                raise ValueError(self._other_numbers(description, classes[k], k, where, how))

    def _check_folders(self, dataset: Any, description: str) -> None:
        """Do as `_check_classes` for data sets of torchvision, which have `classes` and `targets`: folders of images,
        for example, are numbered in the order of their names."""
        while isinstance(dataset, Subset):  # `random_split` makes such parts
            dataset = dataset.dataset
        classes: Any = getattr(dataset, "classes", None)
        targets, known = getattr(dataset, "targets", None), self._classes()
        listed = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
        if known is None or not listed or not isinstance(targets, (list, tuple, Tensor)) or not len(targets):
            return
        labels, where = [int(label) for label in targets], "in `classes`"
        largest = max(labels)
        if largest >= known and self._label_in_batch(dataset, labels.index(largest)) >= known:
            raise ValueError(self._more_classes(description, len(classes), where, largest, known))
        k = self._numbered_otherwise(classes, known, lambda: labels)
        if k is not None and self._label_in_batch(dataset, labels.index(k)) == k:
            how = "target_transform=lambda k: model.config.label2id[dataset.classes[k]]"
            raise ValueError(self._other_numbers(description, classes[k], k, where, how))

    def _numbered_otherwise(self, classes: Sequence[str], known: int, labels: Callable[[], Any]) -> int | None:
        """Return the first of `classes` that are all classes of the model, but have other numbers there, which occurs
        in `labels`."""
        own = self._class_names(known)
        other = [k for k, name in enumerate(classes) if k >= known or own[k] != name]
        if not other or not set(classes) <= set(own):
            return None
        there = set(labels())  # ask for the label of an image of such a class: there may be none
        return next((k for k in other if k in there), None)

    def _class_names(self, known: int) -> list[str]:
        stored = getattr(self._config(), "id2label", None) or {}
        return [str(stored.get(k)) for k in range(known)]

    def _more_classes(self, description: str | None, named: int, where: str, largest: int, known: int) -> str:
        return (
            f"{type(self).__name__}: the {description or 'given'} data set has {named} classes {where} and labels up "
            f"to {largest}; the model has {known} classes. Build it with num_labels={named}."
        )

    def _other_numbers(self, description: str | None, name: str, k: int, where: str, how: str) -> str:
        its = self._class_names(self._classes() or 0).index(name)
        return (
            f"{type(self).__name__}: the {description or 'given'} data set numbers classes of the model otherwise: "
            f"{name!r} is {k} {where}, and {its} in the model's id2label, so that it would call each class by the "
            f"name of another. Number the data as the model does, by {how}, or, where the model is to learn new "
            "numbers, set id2label and label2id in its configuration to those of the data."
        )

    def _label_in_batch(self, dataset: Any, row: int) -> int:
        """Return the label that an image has when it leaves the collator; -1 if that is unknown.

        The transform of a data set, or the collator, may make other labels of those in its columns.
        """
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

"""Compute the loss of a model on batches that have labels, and leave the model as it was."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import class_axis, logits_of
from ..sharpness import RNGState

Loss = Callable[[nn.Module, Any], Tensor]
"""Computes the mean loss of a model over one batch, a tensor `()` with a graph."""
FEW_DIGITS = 1e-4
"""Relative precision of a type above which it is too coarse for rises of the loss."""


class LabelledBatches:
    """Holds batches with labels and the way to compute a loss from them.

    Args:
        where: Name of the function that was called with them, for messages.
        batches: Each a dict of keyword inputs with labels, for models of transformers, or a pair
            `(inputs, labels)` whose loss is the cross-entropy; with `loss`, of any type. They are read once and kept,
            since every measurement must see the same data.
        loss: Computes the mean loss of a model over one batch.

    Raises:
        ValueError: If there is no batch, one has no examples, or `batches` is a single one.
    """

    def __init__(self, where: str, batches: Iterable[Any], loss: Loss | None = None):
        if isinstance(batches, (Tensor, Mapping)):
            raise ValueError(f"{where}: `batches` is a {type(batches).__name__}; expected a list of batches.")
        self.batches = list(batches)
        if not self.batches:
            raise ValueError(f"{where}: `batches` is empty; expected at least one batch of inputs with labels.")
        self.sizes = [_size(batch) for batch in self.batches]
        if 0 in self.sizes:
            raise ValueError(
                f"{where}: batch {self.sizes.index(0)} has no examples, so that its mean loss is no number; expected "
                "at least one example in each."
            )
        self.weights = [size / sum(self.sizes) for size in self.sizes]
        """Share of each batch in the mean over all examples."""
        self._loss = labelled_loss if loss is None else loss

    def __len__(self) -> int:
        return len(self.batches)

    def loss(self, model: nn.Module, number: int) -> Tensor:
        """Compute the loss of `model` on the batch with this number: a scalar.

        Raises:
            ValueError: If `loss` returns something else.
        """
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        value = self._loss(model, _moved(self.batches[number], device))
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"The loss of batch {number} has {found}; expected a tensor with one number, the mean.")
        return value.reshape(())

    def class_axis(self, number: int, logits: Tensor) -> int:
        """Return the dimension of the classes in the logits of this batch: where the cross-entropy of a pair has
        them, or where models have them."""
        is_pair = self._loss is labelled_loss and not isinstance(self.batches[number], Mapping)
        return 1 if is_pair else class_axis(logits.ndim)

    def spread(self, count: int) -> LabelledBatches:
        """Take `count` of the batches, evenly spread: at least one, at most all."""
        count = min(max(count, 1), len(self))
        return LabelledBatches("", [self.batches[k * len(self) // count] for k in range(count)], self._loss)

    def split_to(self, least: int) -> LabelledBatches:
        """Cut batches into parts until there are `least` of them or each has one example; no batch is reordered.

        Batches that are no dict or pair of tensors of one length stay whole.
        """
        size = max(1, -(-sum(self.sizes) // max(least, 1)))
        parts = []
        for batch, count in zip(self.batches, self.sizes, strict=True):
            tensors = list(batch.values()) if isinstance(batch, Mapping) else batch
            plain = type(batch) in (dict, tuple, list) and all(isinstance(t, Tensor) and t.ndim for t in tensors)
            if len(self) >= least or not plain or {len(t) for t in tensors} != {count}:
                parts.append(batch)
                continue
            for start in range(0, count, size):
                cut = slice(start, start + size)
                of_dict = isinstance(batch, Mapping)
                parts.append({k: t[cut] for k, t in batch.items()} if of_dict else type(batch)(t[cut] for t in batch))
        return LabelledBatches("", parts, self._loss)

    def mean(self, values: Sequence[float]) -> float:
        """Compute the mean over all examples of values of batches."""
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def mean_loss(self, model: nn.Module) -> float:
        """Compute the mean loss over all examples, without gradients."""
        return self.mean(self.each_loss(model))

    @torch.no_grad()
    def each_loss(self, model: nn.Module) -> list[float]:
        """Compute the loss of every batch, without gradients."""
        return [self.loss(model, number).item() for number in range(len(self))]


def labelled_loss(model: nn.Module, batch: Any) -> Tensor:
    """Compute the loss of a model of transformers on a dict, or the cross-entropy on a pair `(inputs, labels)`.

    Raises:
        ValueError: If the batch is of another type, or the model computes no loss from it.
    """
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} computed no loss from a batch with {sorted(batch)}; expected a dict with "
                "labels. Add them, or pass `loss=` with a function of model and batch."
            )
        return loss
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return F.cross_entropy(logits_of(model(batch[0]), may_be_first=True), batch[1])
    raise ValueError(
        f"`batches` holds a {type(batch).__name__}; expected a dict of keyword inputs with labels, or a pair of "
        "inputs and labels. Pass `loss=` with a function of model and batch for batches of another type."
    )


def refuse_not_finite(where: str, number: int, loss: float) -> None:
    """Raise `ValueError` if the loss of this batch at the place that others are compared with is NaN or infinite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"{where}: the loss of batch {number} is {loss}; expected a finite number. The training of the model has "
            "diverged, its files are damaged, or the batch is: look at an earlier checkpoint, or at the batch."
        )


def warn_of_few_digits(where: str, model: nn.Module) -> None:
    """Warn if parameters of `model` are in bfloat16 or float16, which round small steps and rises of the loss away."""
    few = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and torch.finfo(p.dtype).eps > FEW_DIGITS}
    if few:
        warnings.warn(
            f"{where}: {type(model).__name__} has parameters in {', '.join(sorted(few))}, of two or three digits. "
            "Small steps of weights and small rises of the loss are rounded away, so that what is found is too small "
            "or noise. Pass a copy in float32: torch.nn.Module.float(copy.deepcopy(model)).",
            stacklevel=3,
        )


def deviation(values: Sequence[float]) -> float:
    """Compute the standard deviation of a sample: 0 of one value, NaN if one of them is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Run the block with `model` in evaluation mode; then restore the mode of every module and all random states."""
    was_training = {module: module.training for module in model.modules()}
    random_state = RNGState()
    model.eval()
    try:
        yield
    finally:
        random_state.restore()
        for module, training in was_training.items():
            module.training = training


def _size(batch: Any) -> int:
    """Count the examples of a batch: by the first tensor that it holds, else by a list of targets, names or numbers,
    else by what lies inside of its first entry; one if there is nothing to count."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    entries = list(batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ())
    tensors = [entry for entry in entries if isinstance(entry, Tensor) and entry.ndim]
    if tensors:
        return len(tensors[0])
    lists = [entry for entry in entries if isinstance(entry, (tuple, list)) and entry]
    of_examples = [entry for entry in lists if isinstance(entry[0], (Mapping, str, int, float))]
    if of_examples:
        return len(of_examples[0])
    return next((_size(entry) for entry in entries if isinstance(entry, (Mapping, tuple, list))), 1)


def _moved(batch: Any, device: torch.device) -> Any:
    """Copy a batch to `device`, also if it is there: a loss may change it in place, and it is measured on again."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device, copy=True)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch

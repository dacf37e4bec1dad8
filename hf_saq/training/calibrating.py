"""Calibrate from the training data, before training starts."""

from __future__ import annotations

import copy
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..analysis import cost
from ..conversion import calibrate, needs_calibration
from ..sharpness import RNGState, set_aside
from ..sharpness.schedules.batch_copy import copied
from .replayed_stream import ReplayedStream, replayed
from .step_logs import LOSSES

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4


class Calibrating(Trainer):
    """Calibrates, for [`SAQTrainer`], a model whose activations have no range yet.

    The model runs as training will run it: on the batches of `get_train_dataloader`, changed as a subclass changes
    them in `training_step`, through `compute_loss`.
    """

    model: nn.Module
    _instead_of_step: Callable[[Any], None] | None
    is_aside = False
    """Whether a loss runs for something else than a step at the moment."""
    _cost_logs: dict[str, float] = {}
    """Cost of a model that was calibrated here, for the first line of its log."""

    def calibrate_if_needed(self) -> None:
        """Fit missing activation ranges to the first batches of the training data, alike on every process; those that
        are there, which an earlier training may have learned, are kept.

        Raises:
            ValueError: If a range is missing and there is no training data, or it gives no batch.
        """
        if not needs_calibration(self.model):
            return
        if not self.has_train_data():
            raise ValueError("SAQTrainer: the model is not calibrated and there is no train_dataset to do it with.")
        self._move_to_device()
        with unchanged_rng():
            batches = self._first_batches()
            calibrate(self.model, batches, run=self.run_forward, only_missing=True)
            self._count_cost(batches[0])

    def has_train_data(self) -> bool:
        """Tell whether there is something to train on: a data set, or a loader that a subclass makes without one."""
        return self.train_dataset is not None or type(self).get_train_dataloader is not Trainer.get_train_dataloader

    @contextmanager
    def fresh_loader(self) -> Iterator[Any]:
        """Give a training data loader that is at its beginning, and let go of it and of its workers afterwards.

        What it takes from a stream before training comes again in training.
        """
        stream = self.train_dataset
        if (
            isinstance(stream, IterableDataset)
            and not isinstance(stream, ReplayedStream)
            and not is_of_datasets(stream)
        ):
            self.train_dataset = replayed(stream)
        loader = self.get_train_dataloader()
        self._tell_length(loader)
        try:
            with unchanged_generators_of(loader):
                yield loader
        finally:
            kept = self.accelerator._dataloaders  # would keep it, with its workers, until the end of the run
            kept[:] = [one for one in kept if one is not loader]

    def _tell_length(self, loader: Any) -> None:
        """Let losses that change in the course of training read its length from `state`: `Trainer` sets it later."""
        if self.state.max_steps == 0 and (has_length(loader) or self.args.max_steps > 0):
            epochs, *_, self.state.max_steps = self.set_initial_training_values(self.args, loader)
            self.state.num_train_epochs = epochs

    def _first_batches(self) -> list[Any]:
        try:
            with self.fresh_loader() as loader:
                batches = list(itertools.islice(loader, CALIBRATION_BATCHES))
        except ValueError as error:
            if "does not contain any data" not in str(error):  # accelerate says so of an empty stream
                raise
            batches = []
        if not batches:
            raise ValueError(
                "SAQTrainer: the training data gave no batch to calibrate with. Give a train_dataset with at least "
                "one sample, and at least a whole batch where dataloader_drop_last is set."
            )
        return batches

    def _move_to_device(self) -> None:
        """Move the model to the device of its batches. `Trainer` has done so unless it evaluates in half precision."""
        if self.place_model_on_device and not self.is_model_parallel:
            self._move_model_to_device(self.model, self.args.device)

    def run_forward(self, batch: Any) -> None:
        """Run the loss of `batch` forward, on what a subclass makes of it in `training_step`; nothing is trained."""
        items = self._get_num_items_in_batch([batch], self.args.device)

        def forward(inputs: Any) -> None:
            with self.compute_loss_context_manager():
                self.compute_loss(self.model, self._prepare_inputs(copy.copy(inputs)), num_items_in_batch=items)

        self._instead_of_step = forward
        try:
            # Allow gradients, for losses that run a backward of their own; `set_aside` removes them again.
            with self.aside(), torch.enable_grad(), set_aside(self.model.parameters()):
                self.training_step(self.model, copied(batch), items)
        finally:
            self._instead_of_step = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block for something else than training: what a loss logs in it belongs to no step."""
        before, self.is_aside = self.is_aside, True
        try:
            yield
        finally:
            self.is_aside = before

    def _count_cost(self, batch: Any) -> None:
        """Count for the log what the model costs for one image. If that fails, training goes on without it."""
        try:
            inputs = {
                name: value[:1] if isinstance(value, Tensor) and value.ndim > 0 else value
                for name, value in self._prepare_inputs(batch).items()
                if name not in self.label_names
            }
            found = cost(self.model, inputs)
        except Exception as error:
            logger.info(
                "The cost of the model is not logged: it cannot be called with the inputs of a batch (%s).", error
            )
            return
        logger.info("For the first training image:\n%s", found)
        self._cost_logs = {
            "bit_operations": found.bops,
            "float_bit_operations": found.float_bops,
            "weight_bytes": found.weight_bytes,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the cost of a model that was calibrated here to the first line of the training log."""
        if any(name in logs for name in LOSSES):
            logs, self._cost_logs = {**logs, **self._cost_logs}, {}
        super().log(logs, start_time)


def is_of_datasets(dataset: Any) -> bool:
    """Tell whether `dataset` is a stream of the library `datasets`, which can be read again from its beginning."""
    return type(dataset).__module__.split(".")[0] == "datasets"


@contextmanager
def unchanged_rng() -> Iterator[None]:
    """Leave the random generators as they were, so that what runs inside does not change the training run.

    Those of Python and numpy are among them: augmentations may draw from any.
    """
    before = RNGState()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def unchanged_generators_of(loader: Any) -> Iterator[None]:
    """Leave generators of a loader's and its samplers' own as they were, which they would go on from in training."""
    restores = list(_restores(loader, set()))
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restores(owner: Any, seen: set[int]) -> Iterator[Callable[[], object]]:
    """Find what puts back each generator that `owner`, or a sampler or loader in it, holds."""
    seen.add(id(owner))
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif id(value) not in seen and (name.endswith("sampler") or isinstance(value, (Sampler, DataLoader))):
            yield from _restores(value, seen)

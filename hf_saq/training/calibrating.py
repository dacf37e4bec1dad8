"""Calibration from the training data, before training starts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from ..analysis.cost import cost
from ..conversion.calibration import calibrate, needs_calibration
from ..sharpness import RNGState

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4


class Calibrating(Trainer):
    """What [`SAQTrainer`] does for a model whose activations have no range yet."""

    model: nn.Module
    _cost_logs: dict[str, float] = {}
    """Of a model calibrated here, for the first line of its log."""

    def calibrate_if_needed(self) -> None:
        """Fit missing activation ranges to the first batches of the training data, alike on every process."""
        if not needs_calibration(self.model):
            return
        if self.train_dataset is None:
            raise ValueError("SAQTrainer: the model is not calibrated and there is no train_dataset to do it with.")
        with unchanged_rng():
            batches = list(self._calibration_batches())
            calibrate(self.model, batches)
            image = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batches[0].items()}
            found = cost(self.model, image)
        logger.info("For the first training image:\n%s", found)
        self._cost_logs = {"bit_operations": found.bops, "weight_bytes": found.weight_bytes}

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Yield plain, unsharded batches: every process must see the same ones."""
        dataset: Any = self.train_dataset
        generator = torch.Generator().manual_seed(self.args.data_seed or self.args.seed)
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=not isinstance(dataset, IterableDataset),
            generator=generator,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="calibration"),
        )
        for batch in itertools.islice(loader, CALIBRATION_BATCHES):
            yield {name: value for name, value in self._prepare_inputs(batch).items() if name not in self.label_names}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what a model calibrated here costs to the first line of the training log."""
        if "loss" in logs:
            logs, self._cost_logs = {**logs, **self._cost_logs}, {}
        super().log(logs, start_time)


@contextmanager
def unchanged_rng() -> Iterator[None]:
    """Leave the random generators as they were, so that calibrating does not change the training run."""
    state = RNGState()
    try:
        yield
    finally:
        state.restore()

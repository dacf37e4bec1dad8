"""Re-estimate batch-norm statistics before a model in training is evaluated or saved."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from ..config import SAQConfig
from ..conversion import norms_with_statistics, reestimate_batch_norm
from ..sharpness import sharding
from ..sharpness.schedules import ScheduledStep
from .calibrating import Calibrating, is_of_datasets, unchanged_rng

logger = logging.getLogger(__name__)

NORM_BATCHES = 16
"""Training batches that statistics are re-estimated from where the schedule needs it, unless told otherwise."""


class ReestimatesNorms(Calibrating):
    """Keeps, for [`SAQTrainer`], batch-norm statistics those of the model that is evaluated and saved.

    Before an evaluation or prediction during training, whoever asks for it, before a checkpoint and at the end of
    training the model runs forward on `SAQConfig.norm_batches` batches of the training data, as
    [`reestimate_batch_norm`] says. Gradients do not depend on running statistics, so training itself goes the same way
    without it.
    """

    saq_config: SAQConfig
    model: nn.Module
    scheduled_step: ScheduledStep | None
    _norms_are_of: tuple[float, ...] = ()
    """Optimizer step, versions and norms of the parameters for which the statistics were re-estimated last."""
    _told_of_stream = False

    @property
    def norm_batches(self) -> int:
        """Number of batches of a re-estimation; 0 where there is none."""
        asked, step = self.saq_config.norm_batches, self.scheduled_step
        if asked is None:
            asked = NORM_BATCHES if step is not None and step.schedule.perturbs_statistics else 0
        return asked if norms_with_statistics(self.model) else 0

    def reestimate_norms_if_needed(self) -> None:
        """Re-estimate the statistics unless that was done for these very weights; alike on all processes."""
        count = self.norm_batches
        if not count or self._are_of_these_weights():
            return
        if isinstance(self.train_dataset, IterableDataset) and not is_of_datasets(self.train_dataset):
            self._tell_of_stream()
            return
        # A run that evaluates more often trains the same way.
        with self._weights_of_evaluation(), unchanged_rng(), self.fresh_loader() as loader:
            reestimate_batch_norm(self.model, itertools.islice(loader, count), run=self.run_forward)
        self._norms_are_of = self._now()

    def _are_of_these_weights(self) -> bool:
        """Tell whether the statistics were re-estimated for the weights that are there now, on every process."""
        known = self._norms_are_of == self._now()
        if self.accelerator.num_processes > 1:  # each may hold another part of the weights
            everywhere = self.accelerator.gather(torch.tensor([known], device=self.accelerator.device))
            known = bool(everywhere.all())
        return known

    @torch.no_grad()
    def _now(self) -> tuple[float, ...]:
        # The step alone does not tell: an average of weights may have taken the place of those that were trained.
        # Versions alone do not either: writing through `p.data`, as many averages are put in place, changes none.
        parameters = [sharding.local(p) for p in self.model.parameters() if p.is_floating_point()]
        norms = torch.stack([norm.cpu().double() for norm in torch._foreach_norm(parameters)]).nan_to_num(nan=-1.0)
        return (self.state.global_step, *(p._version for p in self.model.parameters()), *norms.tolist())

    @contextmanager
    def _weights_of_evaluation(self) -> Iterator[None]:
        """Let an optimizer that evaluates at other weights than it trains at (schedule-free ones) put those in place.

        `Trainer` does so before it evaluates.
        """
        optimizer: Any = self.optimizer
        if not callable(getattr(optimizer, "eval", None)):
            yield
            return
        before = self._now()
        optimizer.eval()
        were_others = self._now() != before
        try:
            yield
        finally:
            if were_others:
                optimizer.train()

    def _tell_of_stream(self) -> None:
        if not self._told_of_stream:
            self._told_of_stream = True
            logger.warning(
                "Batch-norm statistics are not re-estimated: train_dataset is a stream, and reading it again could "
                "lose samples. Under this schedule they come from perturbed passes; call `hf_saq."
                "reestimate_batch_norm(model, batches)` before you evaluate or save, or choose another schedule."
            )

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        self._norms_are_of = ()
        return super()._init_training_state(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_evaluate or self.control.should_save:
            self.reestimate_norms_if_needed()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_under_way():
            self.reestimate_norms_if_needed()
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # A callback may have changed the weights since the evaluation of this step, which was that of an average.
        self.reestimate_norms_if_needed()
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Of several processes one alone may be saving, and the others would not take part in it.
        if self._is_under_way() and self.accelerator.num_processes == 1:
            self.reestimate_norms_if_needed()
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._norms_are_of = self._now()  # they were estimated before that checkpoint

    def _is_under_way(self) -> bool:
        """Tell whether weights have been trained since `train` was called, and it has not returned."""
        return self.is_in_train and self.state.global_step > getattr(self, "_initial_global_step", 0)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.reestimate_norms_if_needed()
        return super()._finalize_training(*args, **kwargs)

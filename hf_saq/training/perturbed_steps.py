"""Take the sharpness-aware step inside of `transformers.Trainer`, and log it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..config import SAQConfig
from ..sharpness import SharpnessAwareMinimizer, default_rho
from ..sharpness.schedules import KNOBS, ScheduledStep
from .step_logs import StepLogs

logger = logging.getLogger(__name__)


class PerturbedSteps(Trainer):
    """Runs the passes of an optimizer step for [`SAQTrainer`].

    Attributes:
        minimizer: The parts of a perturbed pass; `None` for plain quantization-aware training.
        scheduled_step: The passes of a step under the schedule; `None` for plain quantization-aware training.
        sample_names: Keys of a batch whose values have one entry for each sample: the model's main input and the
            labels. Add the keys of your own batches, so that a schedule may take parts of them.
    """

    saq_config: SAQConfig
    model: nn.Module
    minimizer: SharpnessAwareMinimizer | None = None
    scheduled_step: ScheduledStep | None = None
    _instead_of_step: Callable[[Any], None] | None = None
    """What runs on a batch that reaches [`training_step`], while set: see [`Calibrating`]."""

    def prepare_steps(self) -> None:
        """Build what the steps need. Call it when the model and the accelerator exist."""
        self._step_batches: list[Any] = []
        self._micro_batch = 0  # number of them that are done
        self._logs = StepLogs()
        plain = self.accelerator.unwrap_model(self.model)
        main_input = getattr(plain, "main_input_name", "pixel_values")
        self.sample_names = {main_input, "pixel_values", *self.label_names}
        if getattr(plain, "accepts_loss_kwargs", None) is None:
            # `Trainer` takes a `**kwargs` in `forward` as a promise to use `num_items_in_batch` in the loss. Image
            # classifiers do not keep it, and gradients come out `gradient_accumulation_steps` times too large.
            self.model_accepts_loss_kwargs = False
        config = self.saq_config
        if config.case is None:
            return
        rho = config.rho
        if rho is None:
            rho, family = default_rho(self.model)
            logger.warning("SAQConfig.rho is not set; using rho=%g, the default for %s models.", rho, family)
        self.minimizer = SharpnessAwareMinimizer(
            self.model,
            rho=rho,
            case=config.case,  # type: ignore[arg-type]
            adaptive=config.adaptive,
            eta=config.eta,
            perturb=config.perturb,
            sync=config.sync,
        )
        self.scheduled_step = ScheduledStep(
            self.minimizer, config.perturbation_schedule(), self._loss_scale, self.sample_names
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch: leave the gradients in `p.grad`, at the perturbed weights if the schedule says so.

        Returns:
            The clean loss; where a pass over the whole batch is made at perturbed weights only, the perturbed one.
        """
        if self._instead_of_step is not None:
            self._instead_of_step(inputs)
            return torch.zeros((), device=self.args.device)
        plain_step, step = super().training_step, self.scheduled_step
        if step is None:
            return plain_step(model, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):
            # Let a schedule-free optimizer move parameters here: before a perturbation is in place, not while it is.
            self.optimizer.train()  # type: ignore[union-attr]

        def backward(batch: dict[str, Any], reduce: bool = True) -> Tensor:
            items: Any = num_items_in_batch
            if items is not None and step.share != 1:  # it counts whole batches
                items = items * step.share
            with nullcontext() if reduce else self.accelerator.no_sync(model=model):
                return plain_step(model, copy.copy(batch), items)

        batches, k = self._step_batches or [inputs], self._micro_batch
        batches[k] = inputs  # a subclass may have changed it on the way here
        self._micro_batch = (k + 1) % len(batches)
        outcome = step.micro_batch(k, batches, backward, self.state.global_step, self.state.max_steps)
        self._logs.add(outcome, len(batches), was_watched=step.schedule.trigger and self._micro_batch == 0)
        return outcome.loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take batches as `Trainer` does, and keep those of one optimizer step: a schedule may need them together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Start from 0: a callback may have stopped the previous step half-way.
        self._step_batches, self._micro_batch = list(batches) if self.scheduled_step is not None else [], 0
        if self.scheduled_step is not None and batches:
            used = self.scheduled_step.batches_of(batches, self.state.global_step, self.state.max_steps)
            if used is not batches:  # losses are divided by the count of items of what is trained on
                num_items = self._get_num_items_in_batch(list(used), device)
        return batches, num_items

    def start_steps_again(self) -> None:
        """Forget what the steps of an earlier training left: batches, sums for the log, the schedule's memory."""
        self._step_batches, self._micro_batch, self._logs = [], 0, StepLogs()
        if self.scheduled_step is not None:
            self.scheduled_step.start_again()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the quantities of the perturbation to training logs.

        `loss` is always that at the quantized weights. Where steps have it at perturbed ones only, that is
        `perturbed_loss`, and `loss` is the mean of the others, if there are any.
        """
        if "loss" in logs and self.minimizer is not None:
            own = self._logs.take(self.accelerator, self.minimizer.skipped)
            if "perturbed_loss" in own:
                logs = {name: value for name, value in logs.items() if name != "loss"}
            logs = {**own, **logs} if "perturbed_loss" in own else {**logs, **own}
        if "loss" in logs or "perturbed_loss" in logs:
            # Take them here: a callback's own `on_log` comes after the history and the other callbacks have theirs.
            for callback in self.callback_handler.callbacks:
                logs = {**logs, **getattr(callback, "to_log", dict)()}
        super().log(logs, start_time)

    def _hyperparameters(self) -> dict[str, Any]:
        """List for the model card what the steps used: the configuration, and what its presets and defaults meant."""
        if self.minimizer is None or self.scheduled_step is None:
            return {}
        schedule = self.scheduled_step.schedule
        resolved = {name: getattr(schedule, name) for name in KNOBS}
        return {**self.saq_config.to_dict(), **resolved, "rho": self.minimizer.rho}

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

"""Take the sharpness-aware step inside of `transformers.Trainer`, and log it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..config import SAQConfig
from ..sharpness import SharpnessAwareMinimizer, default_rho
from ..sharpness.schedules import ScheduledStep
from ..sharpness.schedules.batch_copy import copied
from ..sharpness.schedules.partial_batch import count_samples
from .columns import counted_labels
from .oscillation_callback import OscillationCallback
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
    _step_batches: list[Any]
    _used_batches: list[Any]
    """Those that the step is made of, where there are several."""
    _divisors: list[Any]
    """Of their mean losses."""
    _micro_batch: int
    """Number of them that are done."""
    _drawn: int
    """Number of micro-batches that were drawn for the step."""
    _logs: StepLogs
    _has_perturbed_losses: bool
    _was_reached: bool
    """Whether a step of this training ran here."""
    _begun: int | None
    """Optimizer step that this training began with."""
    _built_from: tuple[nn.Module, dict[str, Any]]
    """Model and configuration that the steps belong to."""
    _instead_of_step: Callable[[Any], None] | None = None
    """What runs on a batch that reaches [`training_step`], while set: see [`Calibrating`]."""

    def prepare_steps(self) -> None:
        """Build what the steps need. Call it when the model and the accelerator exist."""
        self.start_steps_again()
        plain = self.accelerator.unwrap_model(self.model)
        main_input = getattr(plain, "main_input_name", "pixel_values")
        self.sample_names = {main_input, "pixel_values", *self.label_names}
        if getattr(plain, "accepts_loss_kwargs", None) is None:
            # `Trainer` takes a `**kwargs` in `forward` as a promise to use `num_items_in_batch` in the loss. Many
            # image classifiers do not keep it, and gradients come out `gradient_accumulation_steps` times too large.
            # Leave losses as means over their micro-batch, and weight those by their items: right for all of them.
            self.model_accepts_loss_kwargs = False
        self._build_steps()

    def _build_steps(self) -> None:
        config = self.saq_config
        self._built_from = self.model, config.to_dict()
        if self.minimizer is not None:
            self.minimizer.detach()
        self.minimizer = self.scheduled_step = None
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

    def follow_changes(self) -> None:
        """Build the steps anew if the model or the configuration was changed since; `Trainer` lets users do so.

        Raises:
            ValueError: If a field is out of range, or `Trainer` would not train this model.
        """
        model, fields = self._built_from
        now = self.saq_config.to_dict()
        is_another = self.model is not model and not self.is_fsdp_enabled  # which puts its own around the model
        if now == fields and not is_another:
            return
        SAQConfig(**now)  # checks the fields, which may have been set one by one
        unwrap = self.accelerator.unwrap_model
        if is_another and unwrap(self.model_wrapped) is not unwrap(self.model):
            raise ValueError(
                "SAQTrainer: trainer.model is another model now, but trainer.model_wrapped, which Trainer trains, is "
                "the former one. Set both, and trainer.optimizer to None; or build another trainer."
            )
        if now["scale_lr_ratio"] != fields["scale_lr_ratio"] and self.optimizer is not None:
            warnings.warn(
                f"SAQTrainer: saq_config.scale_lr_ratio={now['scale_lr_ratio']:g} is not applied to the optimizer "
                "that is there already. Set trainer.optimizer to None to have a new one.",
                stacklevel=3,
            )
        self._build_steps()

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
        self._was_reached = True
        self._check_number_of_batches()
        step, k = self.scheduled_step, self._micro_batch
        self._micro_batch = (k + 1) % max(1, len(self._used_batches))
        if step is None:
            return self._weighted_step(model, inputs, num_items_in_batch, k)
        if callable(getattr(self.optimizer, "train", None)):
            # Let a schedule-free optimizer move parameters here: before a perturbation is in place, not while it is.
            self.optimizer.train()  # type: ignore[union-attr]

        def backward(batch: dict[str, Any], reduce: bool = True) -> Tensor:
            items: Any = num_items_in_batch
            if items is not None and step.share != 1:  # it counts whole batches
                items = items * step.share
            others = enumerate(zip(self._step_batches, self._used_batches, strict=False))
            its_number = next((j for j, known in others if any(batch is one for one in known)), k)
            with nullcontext() if reduce else self.accelerator.no_sync(model=model):
                # Let a loss change its batch, as mixing in place does, without a trace for the other pass.
                return self._weighted_step(model, copied(batch), items, its_number)

        batches = self._step_batches or [inputs]
        batches[k] = inputs  # a subclass may have changed it on the way here
        outcome = step.micro_batch(k, batches, backward, self.state.global_step, self.state.max_steps)
        self._has_perturbed_losses |= not outcome.is_clean
        share = 1 / self._divisors[k] if self._divisors else 1 / len(batches)
        is_last = self._micro_batch == 0
        self._logs.add(outcome, share, was_watched=step.schedule.trigger and is_last)
        if is_last:
            self._logs.end_step()
        return outcome.loss

    def _weighted_step(self, model: nn.Module, inputs: dict[str, Any], items: Any, k: int) -> Tensor:
        """Run the plain step of micro-batch `k`, whose mean loss counts by the share that it has of all items."""
        count = getattr(self, "current_gradient_accumulation_steps", 1)
        if k < len(self._divisors):
            self.current_gradient_accumulation_steps = self._divisors[k]  # `Trainer` divides by it, and that is all
        try:
            return super().training_step(model, inputs, items)
        finally:
            self.current_gradient_accumulation_steps = count

    def _count_items(self, batch: Any) -> Any:
        """Count what the mean loss of a batch is a mean of: labels that are not ignored; `None` if unknown."""
        found = [batch[name] for name in self.label_names if name in batch] if isinstance(batch, Mapping) else []
        labels = found[0] if found and isinstance(found[0], Tensor) else None
        if labels is None or labels.is_floating_point():
            return count_samples(batch, self.sample_names).size
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        count = counted_labels(labels, config).sum().clamp(min=1)
        return count.item() if labels.device.type == "cpu" else count  # elsewhere the host would wait for it

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take batches as `Trainer` does, and keep those of one optimizer step: a schedule may need them together."""
        self._refuse_plain_steps()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._begun is None:
            self._begun = self.state.global_step
        self._drawn = len(batches)
        # Start from 0: a callback may have stopped the previous step half-way.
        self._step_batches, self._micro_batch = list(batches) if self.scheduled_step is not None else [], 0
        used: Any = batches
        if self.scheduled_step is not None and batches:
            used = self.scheduled_step.batches_of(batches, self.state.global_step, self.state.max_steps)
            if used is not batches:  # losses are divided by the count of items of what is trained on
                num_items = self._get_num_items_in_batch(list(used), device)
        self._used_batches = list(used) if len(used) > 1 else []
        counts = [self._count_items(batch) for batch in self._used_batches]
        self._divisors = [] if None in counts else [sum(counts) / count for count in counts]
        return batches, num_items

    def _refuse_plain_steps(self) -> None:
        """Raise `RuntimeError` if steps were taken without a single one of them here, whatever some of them skip."""
        has_steps = self._begun is not None and self.state.global_step > self._begun
        if self.scheduled_step is not None and has_steps and not self._was_reached:
            raise RuntimeError(
                f"{type(self).__name__}.training_step did not call that of SAQTrainer, which takes the perturbed "
                "passes: this is plain training. Call super().training_step(model, inputs, num_items_in_batch) in it, "
                "or change the loss in compute_loss instead, or say SAQConfig(case=None)."
            )

    def _check_number_of_batches(self) -> None:
        """Raise `RuntimeError` if a subclass gives a step more or fewer micro-batches than were drawn and counted."""
        given = getattr(self, "current_gradient_accumulation_steps", 1)  # `Trainer` counts what it was given
        if given == self._drawn or not self.is_in_train:
            return
        if self._drawn or (given > 1 and self.scheduled_step is not None):
            raise RuntimeError(
                f"{type(self).__name__}.get_batch_samples returned {given} micro-batches for a step, and that of "
                f"SAQTrainer {self._drawn}: they would have wrong shares in the gradient, or none. Call "
                "super().get_batch_samples(...) in it and return as many batches; leave samples out in the data set "
                "or in the collator."
            )

    def start_steps_again(self) -> None:
        """Forget what the steps of an earlier training left: batches, sums for the log, the schedule's memory."""
        self._step_batches, self._used_batches, self._divisors = [], [], []
        self._micro_batch, self._drawn, self._has_perturbed_losses = 0, 0, False
        self._logs = StepLogs(leaves_out_nan=self.args.logging_nan_inf_filter)
        self._begun, self._was_reached = None, False
        if self.scheduled_step is not None:
            self.scheduled_step.start_again()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Sum up as `Trainer` does; a mean with losses at perturbed weights in it is no `train_loss`."""
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(metrics=self._named_train_loss(output.metrics))

    def _named_train_loss(self, logs: dict[str, float]) -> dict[str, float]:
        """Name the mean loss of a training. An evaluation with the prefix "train" has a `train_loss` of its own."""
        is_of_training = "total_flos" in logs
        own = "train_perturbed_loss" if self._has_perturbed_losses and is_of_training else "train_loss"
        return {own if name == "train_loss" else name: value for name, value in logs.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the quantities of the perturbation to training logs.

        `loss` is always that at the quantized weights. Where steps have it at perturbed ones only, that is
        `perturbed_loss`, and `loss` is the mean of the others, if there are any.
        """
        logs = self._named_train_loss(logs)
        if "loss" in logs and self.minimizer is not None:
            own = self._logs.take(self.accelerator, self.minimizer.skipped)
            if "perturbed_loss" in own:
                logs = {name: value for name, value in logs.items() if name != "loss"}
            logs = {**own, **logs} if "perturbed_loss" in own else {**logs, **own}
        if "loss" in logs or "perturbed_loss" in logs:
            # Take them here: a callback's own `on_log` comes after the history and the other callbacks have theirs.
            for callback in self.callback_handler.callbacks:
                logs = {**logs, **(callback.to_log() if isinstance(callback, OscillationCallback) else {})}
        super().log(logs, start_time)

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

"""Measure sharpness now and then while training runs, under every schedule alike, for the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis.batch_losses import LabelledBatches, left_as_it_was
from ...analysis.weight_point import WeightPoint
from ...config import SAQConfig
from ...sharpness import SharpnessAwareMinimizer, default_rho
from ...sharpness.schedules.batch_copy import copied
from ..calibrating import Calibrating, unchanged_rng
from ..step_logs import LOSSES

KEY = "measured_sharpness"
STEPS_BETWEEN = 50
"""Fewest optimizer steps between two measurements. One takes two forward passes and a backward pass over one
micro-batch, 1 1/3 plain steps of one micro-batch: 2.7 % of plain training at most."""


class MeasuresSharpness(Calibrating):
    """Adds `measured_sharpness` to training logs of [`SAQTrainer`], as `SAQConfig.log_sharpness` says.

    It is the rise of the loss of the last micro-batch from `Q(w)` to `Q(w) + eps`, with `eps` of length `rho` along
    the gradient of that loss at `Q(w)`: one measure for all schedules and cases and for plain training. The model
    runs in evaluation mode; gradients, statistics and random numbers of the training stay as they are.
    """

    saq_config: SAQConfig
    model: nn.Module
    minimizer: SharpnessAwareMinimizer | None
    _last_inputs: Any = None
    _last_logged_step = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch as the trainer does, and keep it for a measurement."""
        if self._instead_of_step is None and self.measures_sharpness:
            self._last_inputs = inputs
            if self.minimizer is None:  # passes of a perturbed step have copies of their own
                inputs = copied(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sharpness to a line of the training log, if the last one is long enough ago.

        What a loss logs by itself is left out where it runs for a measurement or a calibration and not for a step.
        """
        if self.is_aside:
            return
        step = self.state.global_step
        if any(name in logs for name in LOSSES) and self.measures_sharpness and self._last_inputs is not None:
            if step // STEPS_BETWEEN > min(self._last_logged_step, step) // STEPS_BETWEEN:
                logs = {**logs, KEY: self._measured_sharpness()}
            self._last_logged_step = step
        super().log(logs, start_time)

    @property
    def measures_sharpness(self) -> bool:
        """Tell whether this run logs it: hooks would make compiled models compile anew, and shards are not whole."""
        asked = self.saq_config.log_sharpness
        wanted = self.minimizer is not None if asked is None else asked
        return wanted and not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile)

    def _measured_sharpness(self) -> float:
        """Measure on each process with its own micro-batch, and return the mean."""
        config = self.saq_config
        rho = self.minimizer.rho if self.minimizer is not None else config.rho
        if rho is None:
            rho = default_rho(self.model)[0]
        model = self.accelerator.unwrap_model(self.model)
        data = LabelledBatches("SAQTrainer", [self._last_inputs], self._loss_of_inputs)
        with unchanged_rng(), left_as_it_was(model):
            point = WeightPoint("SAQConfig.log_sharpness", model, config.perturb)
            here, gradient = point.gradient(data, 0)
            rise = point.loss(data, 0, point.climb(gradient, rho, config.adaptive, config.eta)) - here
        mean = self.accelerator.gather(torch.tensor([rise], device=self.accelerator.device)).mean()
        return round(mean.item(), 6)

    def _loss_of_inputs(self, model: nn.Module, batch: Any) -> Tensor:
        items = self._get_num_items_in_batch([batch], self.args.device)
        inputs = self._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
        with self.aside(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=items)  # type: ignore[return-value]

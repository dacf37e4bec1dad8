"""Perturb the steps whose gradient is long: AE-SAM, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
arXiv:2304.14647."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ... import sharding
from ..knobs import Knobs
from ..rule import Action, MicroBatch, Outcome, StepRule

DECAY = 0.9
"""The paper's `delta`."""

FIRST_THRESHOLD, LAST_THRESHOLD = 1.0, -1.0
"""The paper's `lambda_2` and `lambda_1`: `c_t` at the beginning and at the end of training."""


class Triggered(StepRule):
    """Runs plain passes; after the last micro-batch the trigger may replace all gradients by perturbed ones."""

    def forget(self) -> None:
        self.trigger = NormTrigger()
        self._clean_losses: list[Tensor] = []

    @classmethod
    def check(cls, knobs: Knobs) -> None:
        if knobs.interval > 1 or knobs.reuse is not None:
            raise ValueError(
                f"trigger=True with interval={knobs.interval}, reuse={knobs.reuse!r}: the trigger alone decides which "
                "steps are perturbed. Leave interval and reuse out, or the trigger."
            )
        if knobs.ascent_fraction < 1:
            raise ValueError(
                f"trigger=True with ascent_fraction={knobs.ascent_fraction}: a step that is not perturbed uses the "
                "gradient of the first pass, which must therefore see the whole batch. Leave one of them out."
            )

    @classmethod
    def action(cls, knobs: Knobs, step: int) -> Action:  # noqa: ARG003
        return "watch"

    @classmethod
    def first_passes(cls, knobs: Knobs) -> float:  # noqa: ARG003
        return 1.0  # this is the most it can be

    def begin_step(self) -> None:
        self._clean_losses = []

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        minimizer = self.minimizer
        with minimizer.recorded():
            outcome = Outcome(micro.backward(micro.batch))
        self._clean_losses.append(outcome.loss)
        if not micro.is_last:
            return outcome
        if not self._fires(micro.progress):
            minimizer.reset()
            return outcome
        for p in minimizer.parameters:
            p.grad = None
        for j, (batch, clean_loss) in enumerate(zip(micro.batches, self._clean_losses, strict=True)):
            with minimizer.perturbed():
                perturbed_loss = micro.backward(batch, reduce=j == micro.k)
            outcome.sharpness.append(perturbed_loss - clean_loss)
        outcome.ascent_norm = self.norm_per_sample()
        return outcome

    def _fires(self, progress: float) -> bool:
        norm = sharding.norm([p.grad for p in self.minimizer.model.parameters() if p.grad is not None])
        squared = (sharding.precise(norm) / self.loss_scale()) ** 2
        return self.trigger.fires(self.minimizer.prepare(sharding.averaged(squared)), progress)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"mean": self.trigger.mean, "variance": self.trigger.variance}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.trigger.mean, self.trigger.variance = values["mean"], values["variance"]


class NormTrigger:
    """Fires if `||g||^2 >= mean + c_t * std`, with running `mean` and `std` of `||g||^2` that include this one.

    `c_t` goes linearly from 1 to -1, so that perturbations are rare at first and usual at the end. The mean starts at
    the first norm.

    Attributes:
        mean (`float | None`): Running mean; `None` before the first norm.
        variance (`float`): Running variance.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.variance = 0.0

    def fires(self, squared_norm: float, progress: float) -> bool:
        """Take `squared_norm` into the statistics and decide whether to perturb.

        Args:
            squared_norm: Squared L2 norm of the gradient, without any loss scale. One that is not finite does not
                count and never fires.
            progress: Fraction of training that is over, 0 to 1.
        """
        if not math.isfinite(squared_norm):
            return False
        self.mean = squared_norm if self.mean is None else DECAY * self.mean + (1 - DECAY) * squared_norm
        self.variance = DECAY * self.variance + (1 - DECAY) * (squared_norm - self.mean) ** 2
        threshold = FIRST_THRESHOLD + (LAST_THRESHOLD - FIRST_THRESHOLD) * progress
        return squared_norm >= self.mean + threshold * math.sqrt(self.variance)

"""Run the steps of ways that the package does not have: rules like those of `hf_saq/sharpness/schedules/rules`.

They hold for the training loop of this room alone: one micro-batch a step, one process, no dropout, no resuming.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_saq import SAQConfig
from hf_saq.sharpness import Displacement, frozen_norm_statistics, kinds_of_parameters
from hf_saq.sharpness.schedules import MicroBatch, Outcome, PerturbationSchedule, StepRule
from hf_saq.sharpness.schedules.partial_batch import first_samples
from hf_saq.sharpness.schedules.rules.echo import Echo

from .shapes import Shape, keys_of, length_of, tensors_of, unchanged

MOMENTUM = 0.9


@dataclass(frozen=True)
class OwnSchedule(PerturbationSchedule):
    """Holds knobs, and a rule that no registry knows.

    Attributes:
        own_rule: Runs the steps; `None`: that of the knobs.
        shape: Changes each `eps`.
        own: Numbers that rule and shape need.
    """

    own_rule: type[StepRule] | None = None
    shape: Shape = unchanged
    own: dict[str, float] = field(default_factory=dict)

    @property
    def rule(self) -> type[StepRule]:
        return self.own_rule or super().rule


@dataclass
class OwnConfig(SAQConfig):
    """Holds a configuration whose steps an own rule may run."""

    own_rule: type[StepRule] | None = None
    shape: Shape = unchanged
    own: dict[str, float] = field(default_factory=dict)

    def perturbation_schedule(self) -> PerturbationSchedule:
        schedule = super().perturbation_schedule()
        if self.own_rule is None:
            return schedule
        knobs: dict[str, Any] = {**vars(schedule)}
        return OwnSchedule(**knobs, own_rule=self.own_rule, shape=self.shape, own=self.own)


class ShapedTwoPasses(StepRule):
    """Takes the full step, or that with an `eps` of a part of the batch, with another shape of `eps`."""

    knobs: OwnSchedule

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        minimizer, fraction = self.minimizer, self.knobs.ascent_fraction
        partial = fraction < 1
        with frozen_norm_statistics(minimizer.model) if partial else nullcontext(), minimizer.ascent():
            clean_loss = micro.backward(first_samples(micro.batch, fraction), reduce=False)
        eps = minimizer.climb()
        eps = self.knobs.shape(eps, minimizer, self.knobs.own) if eps else eps
        with nullcontext() if partial else frozen_norm_statistics(minimizer.model), minimizer.displaced(eps):
            perturbed_loss = micro.backward(micro.batch)
        norm = self.norm_per_sample()
        return Outcome(perturbed_loss if partial else clean_loss, ascent_norm=norm, is_clean=not partial)


class ShapedEcho(Echo):
    """Comes back to each batch, with another shape of `eps`."""

    knobs: OwnSchedule

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        outcome = super().micro_batch(micro)
        if micro.is_last and self.eps:
            self.eps = self.knobs.shape(self.eps, self.minimizer, self.knobs.own)
        return outcome


class AgainstMomentum(StepRule):
    """Displaces each pass by `eps = -rho * m / ||m||`: MSAM, arXiv:2401.12033. One pass a step.

    `m <- 0.9 m + g` is a momentum of the gradients at what is perturbed, `g_q` at quantized weights. The minus sign
    is the paper's: far along the direction of the last steps the loss is higher than here.
    """

    def forget(self) -> None:
        self.eps = Displacement()
        self._momentum: list[Tensor] = []

    @torch.no_grad()
    def micro_batch(self, micro: MicroBatch) -> Outcome:
        minimizer = self.minimizer
        with torch.enable_grad(), minimizer.displaced(self.eps), minimizer.recorded():
            outcome = Outcome(micro.backward(micro.batch), is_clean=not self.eps)
        gradient = minimizer.climb()  # rho / ||g|| times the gradient
        outcome.ascent_norm = self.norm_per_sample()
        if not gradient or minimizer.rho == 0:
            return outcome
        self._momentum = self._momentum or [torch.zeros_like(t) for t in tensors_of(gradient)]
        torch._foreach_mul_(self._momentum, MOMENTUM)
        torch._foreach_add_(self._momentum, tensors_of(gradient), alpha=minimizer.ascent_norm / minimizer.rho)
        values = torch._foreach_mul(self._momentum, -minimizer.rho / length_of(self._momentum))
        placed = dict(zip(keys_of(gradient), values, strict=True))
        self.eps = Displacement({q: placed[q] for q in gradient.outputs}, {p: placed[p] for p in gradient.in_place})
        return outcome


class CleanScales(StepRule):
    """Takes the full step, but updates what quantizers learn by its clean pass, as GAQAT's conflicts of gradients
    (arXiv:2412.05551) suggest."""

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        model = self.minimizer.model
        kinds = kinds_of_parameters(model)
        with self.minimizer.recorded():
            outcome = Outcome(micro.backward(micro.batch, reduce=False))
        clean = {p: p.grad for p, kind in kinds.items() if kind == "scale"}
        for p in model.parameters():
            p.grad = None
        with self.minimizer.perturbed():
            outcome.sharpness.append(micro.backward(micro.batch) - outcome.loss)
        for p, grad in clean.items():
            p.grad = grad
        outcome.ascent_norm = self.norm_per_sample()
        return outcome

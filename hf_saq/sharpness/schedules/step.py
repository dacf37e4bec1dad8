"""An optimizer step under a schedule: which passes run, and what is kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from .. import sharding
from ..displacement import Displacement
from ..minimizer import SharpnessAwareMinimizer
from ..norm_statistics import frozen_norm_statistics
from .look import OrthogonalComponent
from .partial_batch import first_samples
from .schedule import PerturbationSchedule
from .trigger import NormTrigger


class Backward(Protocol):
    """Forward and backward of one micro-batch, whose loss is divided by the number of micro-batches of the step.

    With `reduce=False` gradients are not to be communicated, as in `accelerator.no_sync(model)`.
    """

    def __call__(self, batch: Any, reduce: bool = True) -> Tensor: ...


@dataclass
class Outcome:
    """What one micro-batch gave, for the log.

    Attributes:
        loss: At the quantized weights; at the perturbed ones in a step of one perturbed pass. With `ascent_fraction`,
            of the samples that the first pass saw.
        sharpness: Perturbed minus clean loss, for each micro-batch that has both of the same samples.
        ascent_norm: Of the gradient that a new `eps` was made of here, per sample and without loss scale.
    """

    loss: Tensor
    sharpness: list[Tensor] = field(default_factory=list)
    ascent_norm: float | None = None


class ScheduledStep:
    """Runs the passes that a schedule asks for, in any training loop.

    ```python
    step = ScheduledStep(SharpnessAwareMinimizer(model, rho=0.05), PerturbationSchedule(reuse="previous"))

    def backward(batch, reduce=True):
        loss = loss_of(batch) / len(batches)
        with nullcontext() if reduce else no_sync(model):
            loss.backward()
        return loss

    for number, batches in enumerate(steps):      # lists of micro-batches
        for k in range(len(batches)):
            step.micro_batch(k, batches, backward, number, total_steps)
        optimizer.step()
        optimizer.zero_grad()
    ```

    With `reuse="stale"`, `reuse="previous"` and `trigger` there is one `eps` for each optimizer step, made from all of
    its micro-batches: on each process of its own with `sync="local"`, of all processes with `sync="global"`.

    Args:
        minimizer: Its hooks serve here alone from now on.
        schedule: When to perturb and what to reuse.
        loss_scale: What losses are multiplied with at the moment (fp16).

    Attributes:
        eps (`Displacement`): What the next step of `reuse="stale"` or `"previous"` adds.
        look (`OrthogonalComponent`): What the next step of `reuse="look"` adds to gradients.
        trigger (`NormTrigger`): Running statistics.
    """

    def __init__(
        self,
        minimizer: SharpnessAwareMinimizer,
        schedule: PerturbationSchedule,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ):
        self.minimizer, self.schedule, self.loss_scale = minimizer, schedule, loss_scale
        minimizer.armed = False
        self.eps = Displacement()
        self.look = OrthogonalComponent(schedule.look_alpha)
        self.trigger = NormTrigger()
        self._clean_losses: list[Tensor] = []
        self._clean_grads: dict[nn.Parameter, Tensor] = {}

    def micro_batch(self, k: int, batches: Sequence[Any], backward: Backward, step: int, total_steps: int) -> Outcome:
        """Gradients of micro-batch `k` of optimizer step `step`, in `p.grad`.

        Args:
            k: To be called with 0, 1, ... `len(batches) - 1`.
            batches: All micro-batches of the step.
            backward: See [`Backward`]. Communication of the last call of the last micro-batch is up to the caller.
            step: 0-based.
            total_steps: Of the whole training.
        """
        if k == 0:
            self.minimizer.reset()  # the step before may have been stopped half-way
            self._clean_losses, self._clean_grads = [], {}
        action = self.schedule.action(step, total_steps)
        if action == "two passes":
            return self._two_passes(k, batches, backward)
        if action == "watch":
            return self._watch(k, batches, backward, step / total_steps)
        if action == "plain":
            return Outcome(backward(batches[k]))
        if self.schedule.reuse == "look":
            return self._look(k, batches, backward)
        return self._displaced(k, batches, backward)

    def _two_passes(self, k: int, batches: Sequence[Any], backward: Backward) -> Outcome:
        minimizer, reuse = self.minimizer, self.schedule.reuse
        climbing: Sequence[Any] = [batches[k]]
        if (
            minimizer.sync == "global" or reuse == "stale"
        ):  # one eps for the step: its first micro-batch climbs for all
            climbing = batches if k == 0 else []
        # Running statistics come from the one pass that sees the whole batch: of a part they would be noise.
        partial = self.schedule.ascent_fraction < 1
        for batch in climbing:
            kept = frozen_norm_statistics(minimizer.model) if partial else nullcontext()
            with kept, minimizer.ascent(self._clean_grads if reuse == "look" else None):
                part = first_samples(batch, self.schedule.ascent_fraction)
                self._clean_losses.append(backward(part, reduce=False))
        with minimizer.perturbed(update_statistics=partial) as eps:
            perturbed_loss = backward(batches[k])
        if reuse == "stale":
            self.eps = eps
        if reuse == "look" and k == len(batches) - 1:
            self.look.keep(self._clean_grads)
            self._clean_grads = {}
        outcome = Outcome(self._clean_losses.pop(0))
        if not partial:
            outcome.sharpness = [perturbed_loss - outcome.loss]
        if climbing:
            outcome.ascent_norm = self._norm_per_sample(len(batches) / len(climbing))
        return outcome

    def _displaced(self, k: int, batches: Sequence[Any], backward: Backward) -> Outcome:
        """One pass at the perturbed point, with the `eps` of an earlier step; `"previous"` makes the next of it."""
        minimizer = self.minimizer
        with minimizer.displaced(self.eps):
            if self.schedule.reuse == "stale":
                return Outcome(backward(batches[k]))
            with minimizer.recorded():
                outcome = Outcome(backward(batches[k]))
        if k == len(batches) - 1:
            self.eps = minimizer.climb()
            outcome.ascent_norm = self._norm_per_sample(1)
        return outcome

    def _look(self, k: int, batches: Sequence[Any], backward: Backward) -> Outcome:
        outcome = Outcome(backward(batches[k]))
        if k == len(batches) - 1:
            self.look.add_to_gradients(self.minimizer.model)
        return outcome

    def _watch(self, k: int, batches: Sequence[Any], backward: Backward, progress: float) -> Outcome:
        """A plain pass; after the last micro-batch the trigger may replace all gradients by perturbed ones."""
        minimizer = self.minimizer
        with minimizer.recorded():
            outcome = Outcome(backward(batches[k]))
        self._clean_losses.append(outcome.loss)
        if k < len(batches) - 1:
            return outcome
        parameters = list(minimizer.model.parameters())
        norm = sharding.norm([p.grad for p in parameters if p.grad is not None]) / self.loss_scale()
        if not self.trigger.fires(sharding.average_number(norm**2, like=parameters), progress):
            minimizer.reset()
            return outcome
        for p in parameters:
            p.grad = None
        for j, (batch, clean_loss) in enumerate(zip(batches, self._clean_losses, strict=True)):
            with minimizer.perturbed():
                perturbed_loss = backward(batch, reduce=j == k)
            outcome.sharpness.append(perturbed_loss - clean_loss)
        outcome.ascent_norm = self._norm_per_sample(1)
        return outcome

    def _norm_per_sample(self, factor: float) -> float:
        return self.minimizer.ascent_norm * factor / self.loss_scale()

    # State ---------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next step needs of the earlier ones, on this process: tensors by name, and JSON-plain values."""
        model = self.minimizer.model
        tensors = self.look.named(model) if self.schedule.reuse == "look" else self.eps.named(model)
        return tensors, {"mean": self.trigger.mean, "variance": self.trigger.variance}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take what [`state`] gave.

        Raises:
            ValueError: If the tensors are not those of this model.
        """
        if self.schedule.reuse == "look":
            self.look.load(tensors, self.minimizer.model)
        else:
            self.eps = Displacement.from_named(tensors, self.minimizer.model)
        self.trigger.mean, self.trigger.variance = values["mean"], values["variance"]

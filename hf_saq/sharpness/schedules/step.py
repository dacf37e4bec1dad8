"""Run optimizer steps under a schedule, in any training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..frozen_batch_norm import frozen_norm_statistics
from ..minimizer import SharpnessAwareMinimizer
from ..random_state import RNGState
from .radius import RadiusMatch
from .rule import Backward, MicroBatch, Outcome
from .schedule import PerturbationSchedule

logger = logging.getLogger(__name__)

RADIUS = "radius"
"""Name of what the match of the radius remembers, among the stored values."""


class ScheduledStep:
    """Runs the passes that a schedule asks for, in any training loop.

    ```python
    step = ScheduledStep(SharpnessAwareMinimizer(model, rho=0.05), PerturbationSchedule(ascent_fraction=0.25))
    ddp = DistributedDataParallel(model)

    def backward(batch, reduce=True):
        with nullcontext() if reduce else ddp.no_sync():  # around the forward too, where DDP looks whether it is in it
            loss = loss_of(ddp, batch) / len(batches)
            loss.backward()
        return loss

    for number, batches in enumerate(steps):      # lists of micro-batches
        for k in range(len(batches)):
            step.micro_batch(k, batches, backward, number, total_steps)
        optimizer.step()
        optimizer.zero_grad()
    ```

    In a single process `backward` needs neither `ddp` nor `no_sync`.

    With `reuse` of "stale", "previous" and "echo", and with `trigger`, there is one `eps` for each optimizer step,
    made of all its micro-batches: those of one process with `sync="local"`, of all processes with `sync="global"`.

    Args:
        minimizer: The parts of a step; nothing else may use it from now on.
        schedule: When to perturb and what to reuse.
        loss_scale: Returns the factor that losses are multiplied by at the moment (fp16).
        sample_names: Keys of a batch whose values have one entry a sample, for `ascent_fraction`; a batch with other
            keys is used whole. `None` goes by the lengths of values alone.

    Attributes:
        rule (`StepRule`): Runs the steps and remembers something between them.
    """

    def __init__(
        self,
        minimizer: SharpnessAwareMinimizer,
        schedule: PerturbationSchedule,
        loss_scale: Callable[[], float] = lambda: 1.0,
        sample_names: Collection[str] | None = None,
    ):
        self.minimizer, self.schedule = minimizer, schedule
        self.rule = schedule.rule(minimizer, schedule, loss_scale, sample_names)
        self.radius = RadiusMatch(minimizer, schedule.ascent_fraction < 1) if schedule.match_radius else None

    def micro_batch(self, k: int, batches: Sequence[Any], backward: Backward, step: int, total_steps: int) -> Outcome:
        """Leave the gradients of micro-batch `k` of optimizer step `step` in `p.grad`.

        Args:
            k: Number of the micro-batch. Call with 0, 1, ... `len(batches) - 1`, in this order.
            batches: All micro-batches of the step.
            backward: See [`Backward`]. Communication of the last call of the last micro-batch is up to the caller.
            step: Number of the optimizer step, from 0.
            total_steps: Number of optimizer steps in the whole training.

        Returns:
            The loss and the quantities for the log.

        Raises:
            TypeError: If `backward` returns no loss.
        """
        backward = _returning_a_loss(backward)
        if k == 0:
            self.minimizer.reset()  # the step before may have been stopped half-way
            self.rule.begin_step()
        action = self.schedule.action(step, total_steps)
        if action == "plain":
            return Outcome(backward(batches[k]))
        if self.schedule.ascent_depth < 1 and k == 0 and not self._knows_layers():
            self._choose_layers(lambda: backward(batches[k], reduce=False))
        progress = step / total_steps
        if self.radius is not None and k == 0:
            self.radius.begin_step()
        outcome = self.rule.micro_batch(micro := MicroBatch(k, batches, backward, action, progress))
        if self.radius is not None:
            outcome.radius_factor = self.radius.factor if micro.is_last else None
            self.radius.add(outcome)
            if micro.is_last:
                self.radius.measure(batches, backward, progress)
                self.radius.end_step()
        return outcome

    def _knows_layers(self) -> bool:
        late = self.minimizer.late
        return late is not None and late.is_current(self.minimizer.model)

    def _choose_layers(self, run: Callable[[], object]) -> None:
        """Decide which layers are perturbed, by up to three passes more that leave no trace."""
        model, before = self.minimizer.model, RNGState()
        try:
            with frozen_norm_statistics(model):
                late = self.minimizer.perturb_last_layers(self.schedule.ascent_depth, run)
        finally:
            before.restore()
        logger.info("Perturbing from %s on: %.1f%% of the operations.", late.first, 100 * late.share)

    def batches_of(self, drawn: Sequence[Any], step: int, total_steps: int) -> Sequence[Any]:
        """Return the micro-batches that optimizer step `step` uses: `drawn`, unless the schedule comes back to others.

        [`micro_batch`] takes what was drawn either way; this is for a count of items that must be made of those used.
        """
        return self.rule.batches_of(drawn, self.schedule.action(step, total_steps))

    @property
    def share(self) -> float:
        """Return the share of the samples that the running `backward` sees, below 1 in a first pass on parts.

        A loss that divides by a number of items, counted in whole batches, must multiply that number by this share.
        """
        return self.rule.share

    def start_again(self) -> None:
        """Forget what earlier steps left, as for a new training."""
        self.minimizer.reset()
        self.minimizer.skipped = 0
        if self.minimizer.late is not None:
            self.minimizer.perturb_all()
        self.rule.forget()
        if self.radius is not None:
            self.radius.forget()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the next step needs of the earlier ones, on this process: named tensors, JSON-plain values."""
        tensors, values = self.rule.state()
        return tensors, values if self.radius is None else {**values, RADIUS: self.radius.state()}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load what [`state`] returned.

        Raises:
            ValueError: If the tensors are not those of this model.
        """
        self.rule.load_state(tensors, values)
        if self.radius is not None:
            self.radius.load_state(values[RADIUS])


def _returning_a_loss(backward: Backward) -> Backward:
    """Let `backward` return a tensor, of a plain number too; refuse one that returns nothing."""

    def checked(*args: Any, **kwargs: Any) -> Tensor:
        loss = backward(*args, **kwargs)
        if loss is None:
            raise TypeError(
                "`backward` returned None; expected the loss of the batch, divided by the number of micro-batches. "
                "End it with `return loss`."
            )
        return loss if isinstance(loss, Tensor) else torch.tensor(float(loss))

    return checked

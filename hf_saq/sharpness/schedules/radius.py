"""Match the radius of an `eps` that is made of a part of its batch, or for a part of the model, to the full step's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import sharding
from ..buffer_state import BufferState
from ..frozen_batch_norm import frozen_norm_statistics
from ..minimizer import SharpnessAwareMinimizer
from ..parameter_gradients import set_aside
from ..random_state import RNGState
from .knobs import Knobs
from .rule import Backward, MicroBatch, Outcome
from .rules import TwoPasses

EVERY = 128
"""Steps between two measurements; at the beginning steps 1, 2, 4, 8, ... are measured, counted from 0."""

COST = 2 / EVERY
"""Passes that measurements add to a step, on average."""

SMALLEST, LARGEST = 0.25, 4.0
"""Bounds of the factor."""

LARGEST_CHANGE = math.log(2)
"""Bound of the change of the factor's logarithm at one measurement."""


class RadiusMatch:
    """Finds the factor of `rho` at which `eps` raises the loss as much as the full step's `eps` does at `rho`.

    An `eps` of the same length that is made of a part of the batch, or that moves the last layers alone, climbs less:
    by how much depends on the model, so that a constant factor such as `1 / sqrt(ascent_fraction)` is right for one
    and harms another. Now and then the full step's two passes run on the micro-batches of a step after its own ones.
    With `r` the rise of the loss that the step's `eps` caused and `R` that of the full step, the factor is multiplied
    by `sqrt(R / r)`, within bounds: the exact ratio would be right for a linear loss and too much for a convex one,
    and single batches are noisy.

    Args:
        minimizer: Its `radius_factor` is set here.
        of_parts: Whether `eps` is made of parts of batches. Where one cannot be parted, as it is too small, the rise
            that it gives is the full step's and says nothing; the factor stays as it is.

    Attributes:
        factor (`float`): What `rho` is multiplied by.
        steps (`int`): Perturbed steps so far.
    """

    def __init__(self, minimizer: SharpnessAwareMinimizer, of_parts: bool):
        self.minimizer, self.of_parts = minimizer, of_parts
        self.forget()

    def forget(self) -> None:
        """Start anew, with the radius as it is."""
        self.factor, self.steps = 1.0, 0
        self.minimizer.radius_factor = 1.0
        self._start: tuple[RNGState, BufferState] | None = None  # what a measured step began with
        self._full: tuple[Tensor, Tensor] | None = None  # its loss and by how much it rises
        self._rises: list[Tensor] = []
        self._perturbed: list[Tensor] = []

    def begin_step(self) -> None:
        """Decide whether this step is measured."""
        self._full, self._start, self._rises, self._perturbed = None, None, [], []
        is_power_of_two = self.steps.bit_count() == 1
        is_due = is_power_of_two if self.steps < EVERY else self.steps % EVERY == 0
        self.steps += 1
        if is_due:
            self._start = RNGState(), BufferState(self.minimizer.model)

    def measure(self, batches: Sequence[Any], backward: Backward, progress: float) -> None:
        """Run the full step's passes if it is time to, on the micro-batches as the step's own passes have seen them.

        They begin as the step began, and leave gradients, random state and buffers as they are.
        """
        if self._start is None:
            return
        minimizer, reference = self.minimizer, TwoPasses(self.minimizer, Knobs())
        after, skipped, ascent_norm = RNGState(), minimizer.skipped, minimizer.ascent_norm
        (random_numbers, buffers), self._start = self._start, None
        minimizer.reset()
        minimizer.radius_factor = 1.0
        sharding.reshard(minimizer.model)  # gradients are set aside where the passes will leave theirs

        def unreduced(batch: Any, reduce: bool = True) -> Tensor:  # noqa: ARG001 (a `Backward`)
            return backward(batch, reduce=False)

        try:
            with (
                set_aside(minimizer.parameters),
                frozen_norm_statistics(minimizer.model, buffers),
                minimizer.all_perturbed(),
            ):
                random_numbers.restore()
                outcomes = [
                    reference.micro_batch(MicroBatch(k, batches, unreduced, "two passes", progress))
                    for k in range(len(batches))
                ]
        finally:
            after.restore()
            minimizer.reset()
            minimizer.radius_factor, minimizer.skipped, minimizer.ascent_norm = self.factor, skipped, ascent_norm
        self._full = _sum([o.loss for o in outcomes]), _sum([rise for o in outcomes for rise in o.sharpness])

    def add(self, outcome: Outcome) -> None:
        """Take in what one micro-batch gave with the step's own `eps`."""
        if outcome.is_clean:
            self._rises += outcome.sharpness
        else:
            self._perturbed.append(outcome.loss)

    def end_step(self) -> None:
        """Adapt the factor if this step was measured; alike on all processes."""
        if self._full is None or not (self._rises or self._perturbed):
            return
        clean, full_rise = self._full
        rise = _sum(self._rises) if self._rises else _sum(self._perturbed) - clean
        if self.of_parts and self._rises:
            rise = rise * float("nan")  # other processes average with this one
        wanted, found = sharding.averaged(full_rise).item(), sharding.averaged(rise).item()
        if not (math.isfinite(wanted) and math.isfinite(found) and wanted > 0):
            return
        change = 0.5 * math.log(wanted / found) if found > 0 else LARGEST_CHANGE
        change = min(max(change, -LARGEST_CHANGE), LARGEST_CHANGE)
        self.factor = min(max(self.factor * math.exp(change), SMALLEST), LARGEST)
        self.minimizer.radius_factor = self.factor

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs, JSON-plain."""
        return {"factor": self.factor, "steps": self.steps}

    def load_state(self, values: dict[str, float]) -> None:
        """Take what [`state`] gave."""
        self.factor, self.steps = values["factor"], int(values["steps"])
        self.minimizer.radius_factor = self.factor


def _sum(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], values[0])

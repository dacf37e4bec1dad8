"""When to perturb. Pure functions of the step, so that every process decides alike and a resumed run goes on alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PerturbationSchedule:
    """Perturb every `interval`-th optimizer step once a fraction `start` of training is over.

    Cost of training, in forward+backward passes per step: `1 + (1 - start) / interval`.

    Args:
        interval: 1 perturbs every step.
        start: 0 perturbs from the first step, 1 never.
    """

    interval: int = 1
    start: float = 0.0

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether optimizer step `step` (0-based) of `total_steps` takes the second pass."""
        first = self.start * total_steps
        return step >= first and (step - int(first)) % self.interval == 0

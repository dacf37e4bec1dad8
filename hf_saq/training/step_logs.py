"""What perturbed steps leave for the log: means since the last line of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..sharpness.schedules import Outcome


@dataclass
class _Mean:
    """A running sum; it stays on the device of what is added, so that nothing waits for it before it is logged."""

    total: Tensor | float = 0.0
    count: int = 0

    def add(self, value: Tensor | float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def value(self) -> Tensor | float:
        return self.total / self.count


@dataclass
class StepLogs:
    """Sums of what the steps since the last line of the log gave; which there are is alike on every process."""

    sharpness: _Mean = field(default_factory=_Mean)
    ascent_norm: _Mean = field(default_factory=_Mean)
    perturbed_share: _Mean = field(default_factory=_Mean)

    def add(self, outcome: Outcome, micro_batches: int, was_watched: bool) -> None:
        """Take in what one micro-batch gave.

        Args:
            micro_batches: Of the step; losses come divided by it, and logs are per image.
            was_watched: Whether a trigger has just decided about this step.
        """
        for difference in outcome.sharpness:
            self.sharpness.add(difference.detach() * micro_batches)
        if outcome.ascent_norm is not None:
            self.ascent_norm.add(outcome.ascent_norm)
        if was_watched:
            self.perturbed_share.add(float(outcome.ascent_norm is not None))

    def take(self, skipped: int) -> dict[str, Tensor | float]:
        """Return the means by their names in the log, and start anew.

        Args:
            skipped: How often there was no direction to perturb in, so far.
        """
        found: dict[str, Tensor | float] = {}
        if self.sharpness.count:
            found["sharpness"] = self.sharpness.value()
        if self.ascent_norm.count:
            found["ascent_norm"] = self.ascent_norm.value()
            found["skipped_perturbations"] = float(skipped)
        if self.perturbed_share.count:
            found["perturbed_share"] = self.perturbed_share.value()
        self.sharpness, self.ascent_norm, self.perturbed_share = _Mean(), _Mean(), _Mean()
        return found


def over_processes(accelerator, values: dict[str, Tensor | float]) -> dict[str, float]:
    """Average each value over all processes, rounded for the log; communicates if there is any."""
    if not values:
        return {}
    own = torch.stack([torch.as_tensor(v, device=accelerator.device, dtype=torch.float32) for v in values.values()])
    means = accelerator.gather(own[None]).mean(dim=0).tolist()
    return {name: round(mean, 6) for name, mean in zip(values, means, strict=True)}

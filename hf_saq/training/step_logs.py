"""Collect for the log what perturbed steps gave: means since the last line of the log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..sharpness.schedules import Outcome

LOSSES = ("loss", "perturbed_loss")
QUANTITIES = (*LOSSES, "sharpness", "ascent_norm", "radius_factor", "perturbed_share")


class StepLogs:
    """Sums up what the steps since the last line of the log gave.

    Sums stay on the device of what is added, so that nothing waits for them before they are logged.

    Args:
        leaves_out_nan: Whether losses that are NaN or infinite are left out, as `logging_nan_inf_filter` says. Such
            norms always are: nothing was perturbed there.
    """

    def __init__(self, leaves_out_nan: bool = False) -> None:
        self._leaves_out_nan = leaves_out_nan
        self._start_again()

    def _start_again(self) -> None:
        self._climbs = 0
        self._losses: dict[str, tuple[Tensor | float, Tensor | float]] = {}  # of a step that is not complete
        self._totals: dict[str, Tensor | float] = dict.fromkeys(QUANTITIES, 0.0)
        self._counts: dict[str, Tensor | float] = dict.fromkeys(QUANTITIES, 0)

    def _add(self, name: str, value: Tensor | float, count: Tensor | float = 1) -> None:
        self._totals[name] = self._totals[name] + value
        self._counts[name] = self._counts[name] + count

    def _add_loss(self, name: str, value: Tensor | float, count: Tensor | float) -> None:
        if self._leaves_out_nan and isinstance(value, Tensor):
            finite = value.isfinite()
            value, count = torch.where(finite, value, 0.0), count * finite
        self._add(name, value, count)

    def end_step(self) -> None:
        """Take the losses of the micro-batches so far for those of a whole step."""
        for name, (value, count) in self._losses.items():
            self._add_loss(name, value, count)
        self._losses = {}

    def add(self, outcome: Outcome, share: Tensor | float, was_watched: bool) -> None:
        """Add what one micro-batch gave.

        Args:
            share: Share of the micro-batch in the items of its step; losses come multiplied by theirs, and logs are
                per item.
            was_watched: Whether a trigger has just decided about this step.
        """
        name = "loss" if outcome.is_clean else "perturbed_loss"
        loss, count = self._losses.get(name, (0.0, 0))
        self._losses[name] = loss + outcome.loss.detach(), count + share
        together = len(outcome.sharpness)  # more than one: those of all micro-batches, whose shares add up to 1
        for difference in outcome.sharpness:
            self._add_loss("sharpness", difference.detach(), share if together == 1 else 1 / together)
        if outcome.ascent_norm is not None:
            self._climbs += 1
            if math.isfinite(outcome.ascent_norm):
                self._add("ascent_norm", outcome.ascent_norm)
        if outcome.radius_factor is not None:
            self._add("radius_factor", outcome.radius_factor)
        if was_watched:
            self._add("perturbed_share", float(outcome.ascent_norm is not None))

    def take(self, accelerator: Any, skipped: int) -> dict[str, float]:
        """Return the means over all processes by their names in the log, and start anew.

        Losses are among them only if there was one at a perturbed point, which is not the `loss` of other trainings.
        Every process sends the same numbers, whatever it has seen, so that none waits for another.

        Args:
            skipped: How often there was no direction to perturb in, so far.
        """
        device = accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.end_step()
        own = [*self._totals.values(), *self._counts.values(), self._climbs, float(skipped)]
        self._start_again()
        sums = accelerator.gather(torch.stack([torch.as_tensor(v, device=device, dtype=wide) for v in own])[None])
        *sums, climbs, all_skipped = sums.sum(dim=0).tolist()
        found = {
            name: round(total / count, 6)
            for name, total, count in zip(QUANTITIES, sums[: len(QUANTITIES)], sums[len(QUANTITIES) :], strict=True)
            if count
        }
        if "perturbed_loss" not in found:
            found.pop("loss", None)  # the one that `Trainer` logs
        if climbs:
            found["skipped_perturbations"] = round(all_skipped / accelerator.num_processes, 6)
        return found

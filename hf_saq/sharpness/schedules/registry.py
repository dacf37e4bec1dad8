"""List the schedules by the name that `reuse` takes. A new schedule is one file and one line here."""

from __future__ import annotations

from .rule import StepRule
from .rules import Echo, Look, Previous, Stale, Triggered, TwoPasses

SCHEDULES: dict[str | None, type[StepRule]] = {
    None: TwoPasses,
    "stale": Stale,
    "previous": Previous,
    "look": Look,
    "echo": Echo,
}

TRIGGER = Triggered
"""The schedule of `trigger=True`, which decides itself when to perturb."""

"""List the schedules by the name that `reuse` takes. A new schedule is one file and one line here."""

from __future__ import annotations

from .rule import StepRule
from .rules.echo import Echo
from .rules.look import Look
from .rules.previous import Previous
from .rules.stale import Stale
from .rules.trigger import Triggered
from .rules.two_passes import TwoPasses

SCHEDULES: dict[str | None, type[StepRule]] = {
    None: TwoPasses,
    "stale": Stale,
    "previous": Previous,
    "look": Look,
    "echo": Echo,
}

TRIGGER = Triggered
"""The schedule of `trigger=True`, which decides itself when to perturb."""

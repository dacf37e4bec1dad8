"""Decide when to perturb and what to reuse, and run the step under such a schedule.

Each schedule is a [`StepRule`] in a file of its own in `rules/` and a line in `registry.py`; `schedule.py` has the
tables of costs and of what goes together.
"""

from .knobs import KNOBS
from .presets import DEFAULT_PRESET, PRESETS, resolve_preset
from .registry import SCHEDULES
from .rule import Action, Backward, MicroBatch, Outcome, StepRule
from .schedule import PerturbationSchedule
from .step import ScheduledStep

__all__ = [
    "DEFAULT_PRESET",
    "KNOBS",
    "PRESETS",
    "SCHEDULES",
    "Action",
    "Backward",
    "MicroBatch",
    "Outcome",
    "PerturbationSchedule",
    "ScheduledStep",
    "StepRule",
    "resolve_preset",
]

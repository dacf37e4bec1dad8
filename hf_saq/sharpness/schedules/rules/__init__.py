"""Run the passes of a step in one way each: every file is a schedule, by the name that `reuse` or `trigger` gives it.

Comes in: a minimizer, knobs and the micro-batches of a step. Goes out: gradients in `p.grad`, an outcome for the log,
and what the next step needs. Must not know: the other schedules (but `two_passes`, which some extend), trainers.
"""

from .echo import Echo
from .look import Look
from .previous import Previous
from .stale import Stale
from .trigger import Triggered
from .two_passes import TwoPasses

__all__ = ["Echo", "Look", "Previous", "Stale", "Triggered", "TwoPasses"]

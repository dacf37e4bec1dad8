"""Hold the knobs of a schedule: plain numbers, each checked for its own range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

KNOBS = ("interval", "ascent_fraction", "ascent_depth", "reuse", "trigger", "match_radius")
"""Knobs that a preset decides."""


@dataclass(frozen=True)
class Knobs:
    """Holds when to perturb and what to reuse, see [`PerturbationSchedule`]."""

    interval: int = 1
    start: float = 0.0
    ascent_fraction: float = 1.0
    ascent_depth: float = 1.0
    reuse: str | None = None
    trigger: bool = False
    match_radius: bool = False
    look_alpha: float = 0.7

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval={self.interval!r}; expected an integer >= 1.")
        if not _is_number(self.start) or not 0 <= self.start <= 1:
            raise ValueError(f"start={self.start!r}; expected a fraction of training from 0 to 1.")
        if not _is_number(self.ascent_fraction) or not 0 < self.ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction={self.ascent_fraction!r}; expected a share of a batch, > 0 and <= 1.")
        if not _is_number(self.ascent_depth) or not 0 < self.ascent_depth <= 1:
            raise ValueError(f"ascent_depth={self.ascent_depth!r}; expected a share of a model, > 0 and <= 1.")
        for name in ("trigger", "match_radius"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; expected True or False.")
        if not _is_number(self.look_alpha) or not 0 <= self.look_alpha < math.inf:
            raise ValueError(f"look_alpha={self.look_alpha!r}; expected a finite number >= 0.")


def ceil_of_product(fraction: float, count: int) -> int:
    """Compute `ceil(fraction * count)` without its rounding error: 0.07 * 100 gives 7, not 8."""
    return math.ceil(fraction * count - 1e-9 * max(count, 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Means of paired differences and what can be said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two ways to train, on the seeds that both have.

    Attributes:
        values: One for each seed.
        half_width: Of the 95 % interval of their mean (Student's t); NaN for a single seed.
    """

    values: list[float]
    half_width: float

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def error(self) -> float:
        """What a plot shows on both sides of the mean: nothing for a single seed."""
        return 0.0 if math.isnan(self.half_width) else self.half_width

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, else 0."""
        if math.isnan(self.half_width) or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.mean - self.half_width:+.2f}, {self.mean + self.half_width:+.2f}]"


def difference(these: Mapping[int, float], those: Mapping[int, float]) -> Difference | None:
    """`these - those`, both by seed; `None` if they have no seed in common."""
    values = [these[seed] - those[seed] for seed in sorted(set(these) & set(those))]
    return Difference(values, half_width(values)) if values else None


def average(differences: Sequence[Difference]) -> Difference:
    """Plain average of the means of comparisons that share no runs; its interval is Welch and Satterthwaite's.

    Args:
        differences: One or more, each of at least two seeds.
    """
    from scipy.stats import t

    squares = [stdev(d.values) ** 2 / len(d.values) for d in differences]  # of the error of each mean
    means = [d.mean for d in differences]
    if not sum(squares):
        return Difference(means, 0.0)
    freedom = sum(squares) ** 2 / sum(v**2 / (len(d.values) - 1) for v, d in zip(squares, differences, strict=True))
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    return Difference(means, quantile * math.sqrt(sum(squares)) / len(means))


def half_width(differences: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, by Student's t; NaN for fewer than two."""
    if len(differences) < 2:
        return math.nan
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return quantile * stdev(differences) / math.sqrt(len(differences))

"""Tell differences between measurements that took turns from noise."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

SAME_SIGN = 0.9
"""Share of rounds in which a difference must have the same sign. By chance alone 9 of 10 have it in 2 of 100 cases."""

Name = TypeVar("Name", bound=Hashable)


def medians_apart(times: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    """Take the median of each measurement; those that cannot be told apart share one, over all their rounds.

    From the fastest on, a measurement joins those before it unless it is slower than the first of them, or
    faster, in nine of ten rounds.

    Args:
        times: What was found in each round, of as many rounds for all.
    """
    groups: list[list[Name]] = []
    for name in sorted(times, key=lambda name: statistics.median(times[name])):
        if groups and not _differ(times[groups[-1][0]], times[name]):
            groups[-1].append(name)
        else:
            groups.append([name])
    found = {}
    for group in groups:
        median = statistics.median([time for name in group for time in times[name]])
        found.update(dict.fromkeys(group, median))
    return found


def _differ(a: Sequence[float], b: Sequence[float]) -> bool:
    differences = [y - x for x, y in zip(a, b, strict=True)]
    most = max(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    return most >= SAME_SIGN * len(differences)

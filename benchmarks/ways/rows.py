"""Stored runs of each way to train, next to plain QAT and to what the way builds on: gains, costs, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Literal

from ..shared.paired import Difference, difference
from ..shared.schedule_variants import FULL, QAT
from .ways import WAYS

Verdict = Literal["keep", "fails its control", "drop", "for comparison"]


@dataclass(frozen=True)
class Runs:
    """The reported runs of one way on one task.

    Attributes:
        by_seed: Record of each seed.
    """

    by_seed: Mapping[int, dict[str, Any]]

    @property
    def test(self) -> dict[int, float]:
        """Return test accuracy in percent, by seed."""
        return {seed: 100 * run["outcome"]["test"] for seed, run in self.by_seed.items()}

    @property
    def passes(self) -> float:
        """Return how many images went forward and backward, on average over seeds, in those of a batch."""
        return mean(r["outcome"]["passes"] * r["outcome"]["steps"] for r in self.by_seed.values())

    @property
    def seconds(self) -> float:
        """Return the processor time of a training: the median over seeds, as the machine does other work as well."""
        return median(r["outcome"]["cpu_seconds"] for r in self.by_seed.values())

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the arguments of one of the runs, which share what was chosen."""
        return next(iter(self.by_seed.values()))["arguments"]


Table = dict[str, dict[str, Runs]]
"""Task -> way -> its runs, in the order of `WAYS`."""


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """Sort the reported runs.

    Raises:
        ValueError: If a task lacks plain QAT.
    """
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for record in records:
        a = record["arguments"]
        if a["kind"] == "run":
            found.setdefault(a["task"], {}).setdefault(a["way"], {})[a["seed"]] = record
    for task, ways in found.items():
        if QAT not in ways:
            raise ValueError(f"{task}: found runs of {sorted(ways)}; expected some of {QAT}.")
    return {task: {way: Runs(ways[way]) for way in WAYS if way in ways} for task, ways in found.items()}


def minus(table: Table, task: str, way: str, other: str) -> Difference | None:
    """Compare two ways on one task, seed by seed, in points of test accuracy; `None` where one was not run."""
    ways = table.get(task, {})
    return difference(ways[way].test, ways[other].test) if way in ways and other in ways else None


def mean_minus(table: Table, way: str, other: str) -> Difference | None:
    """Compare two ways by the mean of both tasks' differences of one seed; `None` where a task lacks one of them."""
    tasks = [t for t in table.values() if way in t and other in t]
    if len(tasks) < len(table) or not tasks:
        return None
    both = [(t[way].test, t[other].test) for t in tasks]
    seeds = set.intersection(*({*these} & {*those} for these, those in both))
    means = {seed: mean(these[seed] - those[seed] for these, those in both) for seed in seeds}
    return difference(means, dict.fromkeys(means, 0.0))


def share_of_full(of_way: Difference | None, of_full: Difference | None) -> float | None:
    """Compute a mean gain over that of full SAQ; `None` where the latter is not positive or one of them is missing."""
    if of_way is None or of_full is None or of_full.mean <= 0:
        return None
    return of_way.mean / of_full.mean


def verdict(table: Table, way: str) -> Verdict | None:
    """Apply the rule that `sweep` states; `None` as long as a task lacks runs."""
    entry = WAYS[way]
    if not entry.is_new:
        return "for comparison"
    if any(minus(table, task, way, entry.builds_on) is None for task in table):
        return None
    wins = wins_once(table, way, entry.builds_on)
    if wins and entry.rival is not None:
        against_rival = mean_minus(table, way, entry.rival)
        wins = against_rival is not None and against_rival.mean >= 0
    if wins and entry.control is not None and not wins_once(table, way, entry.control):
        return "fails its control"
    return "keep" if wins else "drop"


def wins_once(table: Table, way: str, other: str) -> bool:
    """Tell whether the difference to `other` lies above zero on a task and not below zero on any."""
    signs = [d.sign for d in (minus(table, task, way, other) for task in table) if d is not None]
    return bool(signs) and max(signs) > 0 and min(signs) >= 0


def gain(table: Table, task: str, way: str) -> Difference | None:
    """Compare a way to plain QAT."""
    return minus(table, task, way, QAT)


def full_gain(table: Table, task: str) -> Difference | None:
    """Compare full SAQ to plain QAT."""
    return gain(table, task, FULL)

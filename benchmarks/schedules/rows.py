"""Stored runs of each way to train, next to plain QAT with the same seeds: gain and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..shared.paired import Difference, difference
from ..shared.schedule_variants import FULL, QAT, VARIANTS, saq_config


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        seeds: Those that plain QAT was trained with as well.
        test: Test accuracy of each, in percent.
        gain: Difference to plain QAT with the same seeds, in points.
        passes: Forward and backward passes of the training over those of plain QAT, as the schedule says.
        cost: Time of training over that of plain QAT; `None` if it was not measured.
        perturbed_share: Of the steps.
    """

    method: str
    seeds: list[int]
    test: list[float]
    gain: Difference
    passes: float
    cost: float | None
    perturbed_share: float


def share_of(row: Row, full: Row) -> float:
    """Mean gain over that of full SAQ with the same seeds; NaN where that is not positive."""
    gains = [gain for seed, gain in zip(full.seeds, full.gain.values, strict=True) if seed in row.seeds]
    return row.gain.mean / mean(gains) if gains and mean(gains) > 0 else math.nan


def table_rows(runs: Sequence[dict[str, Any]], times: dict[str, Any] | None) -> list[Row]:
    """One row for each method, in the order of `VARIANTS`, of the seeds that it shares with plain QAT.

    Raises:
        ValueError: If there is no run of plain QAT.
    """
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["arguments"]["method"], {})[run["arguments"]["seed"]] = run
    if QAT not in by_method:
        raise ValueError(f"found {len(runs)} results, of {sorted(by_method)}; expected some of {QAT}.")
    plain, plain_tests = by_method[QAT], percent(by_method[QAT])
    order = [QAT, *(m for m in by_method if m not in VARIANTS), *(m for m in VARIANTS if m != QAT)]
    rows = []
    for method in order:
        own = by_method.get(method, {})
        tests = percent(own)
        seeds = sorted(set(own) & set(plain))
        if seeds:
            test, gain = [tests[seed] for seed in seeds], difference(tests, plain_tests)
            assert gain is not None
            share = mean(own[seed]["outcome"]["perturbed_share"] for seed in seeds)
            epochs = own[seeds[0]]["arguments"]["epochs"] / plain[seeds[0]]["arguments"]["epochs"]
            config = own[seeds[0]]["arguments"]["config"]
            passes, cost = epochs * passes_of(config, share), relative_cost(method, config, times, share)
            rows.append(Row(method, seeds, test, gain, passes, cost and epochs * cost, share))
    return rows


def percent(runs: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Test accuracy in percent, by seed."""
    return {seed: 100 * run["outcome"]["test"] for seed, run in runs.items()}


def passes_of(config: dict[str, Any], share: float) -> float:
    """Of a step, on average; `share` of the steps were perturbed."""
    if config.get("case", 3) is None:
        return 1.0
    schedule = saq_config(0.0, config).perturbation_schedule()
    return 1 + share if schedule.trigger else schedule.cost


def relative_cost(method: str, config: dict[str, Any], times: dict[str, Any] | None, share: float) -> float | None:
    """Time of a step over that of a plain one, from the medians of `make step-cost`.

    `start` perturbs in full after a part of training. The trigger was timed with every second step firing; here
    `share` of the steps did.
    """
    if config.get("case", 3) is None:
        return 1.0
    if times is None:
        return None
    if "start" in config:
        return config["start"] + (1 - config["start"]) * times[FULL]["ratio"] if FULL in times else None
    if method not in times:
        return None
    if config.get("trigger"):
        return 1 + share * 2 * (times[method]["ratio"] - 1)
    return times[method]["ratio"]

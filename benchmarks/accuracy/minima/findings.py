"""What stored minima say: whether one method's are flatter than another's, and whether flatter ones score better."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from hf_saq.analysis.bits.layer_sensitivity import rank_correlation

from ...shared.paired import Difference, difference
from ..methods import METHODS, QAT
from ..tasks import TASKS
from .bit_budget import MIXED

MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "steepest rise": lambda s: s["steepest"]["mean"],
    "adaptive rise": lambda s: s["adaptive"]["mean"],
    "random rise": lambda s: s["random"]["mean"],
    "largest eigenvalue": lambda s: s["eigenvalue"],
    "trace": lambda s: s["trace"],
}
"""Name -> how to take it from what `hf_saq.analysis.sharpness` measured."""
RESAMPLES = 2000


@dataclass
class Minima:
    """Runs of one task at one number of bits whose minimum was looked at: records by method and seed."""

    task: str
    bits: int
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{TASKS[self.task].title}, W{self.bits}A{self.bits}"

    def values(self, method: str, measure: str) -> dict[int, float]:
        """One measure of sharpness by seed."""
        return {s: MEASURES[measure](r["outcome"]["sharpness"]) for s, r in self.runs.get(method, {}).items()}

    def losses(self, method: str) -> dict[int, float]:
        """Training loss at `Q(w)` by seed, on the images that sharpness was measured on."""
        return {seed: r["outcome"]["sharpness"]["loss"] for seed, r in self.runs.get(method, {}).items()}

    def test(self, method: str) -> dict[int, float]:
        """Test accuracy in percent by seed."""
        return {seed: 100 * r["outcome"]["test"] for seed, r in self.runs.get(method, {}).items()}

    def ratio(self, method: str, measure: str, over: str = QAT) -> Difference | None:
        """Natural logarithm of the ratio to another method's sharpness, by seed; `None` where not all are positive."""
        these, those = self.values(method, measure), self.values(over, measure)
        shared = set(these) & set(those)
        if not shared or min([these[s] for s in shared] + [those[s] for s in shared]) <= 0:
            return None
        return difference({s: math.log(these[s]) for s in shared}, {s: math.log(those[s]) for s in shared})

    def complete_seeds(self) -> list[int]:
        """Seeds that every method has."""
        return sorted(set.intersection(*(set(runs) for runs in self.runs.values()))) if self.runs else []

    def points(self, seed: int, measure: str) -> list[tuple[float, float]]:
        """Flatness (minus the sharpness) and accuracy of every method, for one seed."""
        return [(-self.values(m, measure)[seed], self.test(m)[seed]) for m in self.runs]

    def within_seeds(self, measure: str) -> Difference | None:
        """Rank correlation of flatness and accuracy over the methods of a seed: one value for each seed."""
        found = {s: correlation(self.points(s, measure)) for s in self.complete_seeds()}
        found = {s: value for s, value in found.items() if not math.isnan(value)}
        return difference(found, dict.fromkeys(found, 0.0))

    def over_all(self, measure: str) -> tuple[float, float, float]:
        """Rank correlation over all methods and seeds, and its 95 % interval: seeds drawn again, with return."""
        seeds = self.complete_seeds()
        of_seed = {s: self.points(s, measure) for s in seeds}
        generator = random.Random(0)
        drawn = []
        for _ in range(RESAMPLES if len(seeds) > 1 else 0):
            value = correlation([p for s in generator.choices(seeds, k=len(seeds)) for p in of_seed[s]])
            drawn += [] if math.isnan(value) else [value]
        whole = correlation([p for s in seeds for p in of_seed[s]])
        if not drawn:
            return whole, math.nan, math.nan
        drawn.sort()
        return whole, drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn)) - 1]


def correlation(points: Sequence[tuple[float, float]]) -> float:
    return rank_correlation([x for x, _ in points], [y for _, y in points]) if len(points) > 1 else math.nan


def minima_of(records: Sequence[dict[str, Any]]) -> list[Minima]:
    """Settings whose minima were looked at, in the order of the tasks; methods in the order of the tables."""
    found: dict[tuple[str, int], Minima] = {}
    for record in records:
        a = record["arguments"]
        if "sharpness" in record["outcome"] and a["kind"] == "run":
            setting = found.setdefault((a["task"], a["bits"]), Minima(a["task"], a["bits"]))
            setting.runs.setdefault(a["method"], {})[a["seed"]] = record
    order = list(METHODS)
    for setting in found.values():
        setting.runs = dict(sorted(setting.runs.items(), key=lambda item: order.index(item[0])))
    tasks = list(TASKS)
    return sorted(found.values(), key=lambda s: (tasks.index(s.task), -s.bits))


def landscapes_of(records: Sequence[dict[str, Any]], setting: Minima) -> dict[str, dict[str, Any]]:
    """`line` and `plane` -> what `landscape` found, of the first seed that has it."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("line", "plane"):
        start = f"{setting.task}-w{setting.bits}-{kind}-seed"
        for record in records:
            if record["name"].startswith(start):
                found.setdefault(kind, record["outcome"])
    return found


@dataclass(frozen=True)
class Mixed:
    """Bits by budget against uniform ones, of one task: test accuracy by seed, and the allocations."""

    task: str
    bits: int
    uniform: Mapping[int, float]
    mixed: Mapping[int, float]
    allocations: Mapping[int, dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{TASKS[self.task].title}, the bit operations of W{self.bits}A{self.bits}"

    @property
    def gain(self) -> Difference | None:
        return difference(self.mixed, self.uniform)

    def mean_bits(self) -> dict[str, tuple[float, float]]:
        """Mean over seeds of the bits of weights and activations, by layer."""
        layers: dict[str, list[tuple[float, float]]] = {}
        for found in self.allocations.values():
            for layer in found["layers"]:
                layers.setdefault(layer["name"], []).append((layer["weight_bits"], layer["activation_bits"]))
        return {name: (mean(w for w, _ in bits), mean(a for _, a in bits)) for name, bits in layers.items()}


def mixed_of(records: Sequence[dict[str, Any]]) -> list[Mixed]:
    """Tasks with runs of bits by budget after plain QAT, and the uniform runs of the same seeds."""
    by_name = {record["name"]: record for record in records}
    found = []
    for task, bits in sorted({(r["arguments"]["task"], r["arguments"]["bits"]) for r in records if is_mixed(r)}):
        of_these = [r for r in records if is_mixed(r) and r["arguments"]["task"] == task]
        mixed = {r["arguments"]["seed"]: r for r in of_these if r["arguments"]["bits"] == bits}
        uniform = {seed: by_name.get(f"{task}-w{bits}-{QAT}-seed{seed}") for seed in mixed}
        allocations = {seed: by_name[f"{task}-w{bits}-allocation-seed{seed}"]["outcome"] for seed in mixed}
        found.append(
            Mixed(
                task,
                bits,
                {seed: 100 * r["outcome"]["test"] for seed, r in uniform.items() if r is not None},
                {seed: 100 * r["outcome"]["test"] for seed, r in mixed.items()},
                allocations,
            )
        )
    return found


def is_mixed(record: dict[str, Any]) -> bool:
    return f"-{QAT}-{MIXED.replace(' ', '-')}-seed" in record["name"]

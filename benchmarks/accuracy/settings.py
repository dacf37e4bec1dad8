"""Stored runs by setting: one task at one number of bits and of images, with all methods and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..shared.paired import Difference, difference
from .methods import QAT
from .tasks import TASKS


@dataclass
class Setting:
    """All runs of one task at one number of bits and images per class.

    Attributes:
        runs: Records by method and seed.
    """

    task: str
    bits: int
    images_per_class: int | None
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{TASKS[self.task].title}, W{self.bits}A{self.bits}"

    @property
    def is_default(self) -> bool:
        return self.images_per_class == TASKS[self.task].images_per_class

    def test(self, method: str) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return {seed: 100 * run["outcome"]["test"] for seed, run in self.runs.get(method, {}).items()}

    def time(self, method: str) -> float | None:
        """Processor time of training with `method` over that of QAT, on the seeds that both ran with one commit;
        `None` if there are none.

        Machines differ in speed. That runs start from one float model does not say that they come from one machine, as
        another one may train the same; those of one commit were made in one go.
        """
        these, those = (self.runs.get(name, {}) for name in (method, QAT))
        of_both = [
            seed
            for seed in sorted(set(these) & set(those))
            if these[seed]["versions"].get("commit") == those[seed]["versions"].get("commit")
        ]
        spent = [sum(runs[seed]["outcome"]["cpu_seconds"] for seed in of_both) for runs in (these, those)]
        return spent[0] / spent[1] if of_both else None

    def gain(self, method: str, over: str = QAT, beside: str | None = None) -> Difference | None:
        """Accuracy of `method` minus that of `over`, in points, on the seeds of both, and of `beside` if given.

        Raises `ValueError` if runs of a seed that are to be compared start from different float models."""
        these, those = (self.runs.get(name, {}) for name in (method, over))
        for seed in sorted(set(these) & set(those)):
            started = [run["outcome"]["float_model"] for run in (these[seed], those[seed])]
            if started[0] != started[1]:
                raise ValueError(
                    f"{self.name}, seed {seed}: {method!r} starts from float model {started[0]}, {over!r} from "
                    f"{started[1]}; expected the same one. Remove the runs of one of them and run `make results` "
                    "again."
                )
        of_both = self.test(over)
        if beside is not None:
            of_both = {seed: of_both[seed] for seed in set(of_both) & set(self.runs.get(beside, {}))}
        return difference(self.test(method), of_both)

    def float_tests(self) -> dict[str, float]:
        """Test accuracy in percent of every float model that runs start from."""
        runs = [run for by_seed in self.runs.values() for run in by_seed.values()]
        return {run["outcome"]["float_model"]: 100 * run["outcome"]["float_test"] for run in runs}


def settings_of(records: Sequence[dict[str, Any]]) -> list[Setting]:
    """In the order of the tasks, most bits first, fewest images first."""
    found: dict[tuple[str, int, int | None], Setting] = {}
    for record in records:
        a = record["arguments"]
        if a["kind"] == "run":
            key = (a["task"], a["bits"], a["images_per_class"])
            setting = found.setdefault(key, Setting(*key))
            setting.runs.setdefault(a["method"], {})[a["seed"]] = record
    order = list(TASKS)
    return sorted(found.values(), key=lambda s: (order.index(s.task), -s.bits, training_images(s)))


def training_images(setting: Setting) -> int:
    """Of one seed."""
    runs = next(iter(setting.runs.values()))
    return next(iter(runs.values()))["outcome"]["training_images"]


def size_studies(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that differ only in the number of images, where there are several."""
    groups: dict[tuple[str, int], list[Setting]] = {}
    for s in settings:
        groups.setdefault((s.task, s.bits), []).append(s)
    return [group for group in groups.values() if len(group) > 1]

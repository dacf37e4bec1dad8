"""One task at one number of bits: its learning rate and radii are chosen, then all methods run on all seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..shared.runs import Runs, fingerprint_of
from .arguments import AccuracyArguments
from .methods import METHODS, QAT
from .task import Paths, Task
from .tasks import TASKS
from .training import float_state, train_one

GIVE_UP = 0.05
"""Values are no longer tried once one is this much worse in validation accuracy than the best so far."""


@dataclass
class Study:
    """One task at one number of bits."""

    task_name: str
    bits: int
    args: AccuracyArguments
    paths: Paths
    runs: Runs
    pool: Executor

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    def run(self) -> None:
        lr, radii = self.chosen()
        counts: Sequence[int | None] = self.args.images_per_class or [self.task.images_per_class]
        for count in counts:
            jobs = [  # seed by seed: an interrupted sweep has complete pairs
                self.arguments("run", self.bits, name, seed, lr, radii.get(self.task.radius_of(name)), count)
                for seed in self.args.seeds
                for name in self.args.methods
            ]
            if not self.task.float_per_seed and not all(self.stored(job) for job in jobs):
                self.check_float_model(count)
            self.outcomes(jobs)

    def stored(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        return self.runs.stored(file_name(arguments, self.task))

    def check_float_model(self, count: int | None) -> None:
        """Runs of one seed are compared with each other, so all of them must start from one float model.

        Raises:
            ValueError: If stored runs started from another one than those to come would.
        """
        every = [
            self.stored(self.arguments("run", self.bits, name, seed, 0.0, None, count))  # whatever its rate and radius
            for seed in self.args.seeds
            for name in METHODS
        ]
        own = fingerprint_of(float_state(self.task_name, self.paths, None, 0))
        for record in every:
            if record is not None and record["outcome"]["float_model"] != own:
                used = sorted({r["arguments"]["seed"] for r in every if r is not None})
                raise ValueError(
                    f"{record['name']}: this run is stored and started from float model "
                    f"{record['outcome']['float_model']}, found {own} in {self.paths.cache}; expected the same, as "
                    f"methods are compared seed by seed. Choose --seeds other than {used}, or another --results."
                )

    def chosen(self) -> tuple[float, dict[str, float]]:
        """Learning rate of plain QAT, and the radius of each method that has one of its own.

        Each is the best in mean validation accuracy, the smaller of equals. They are tried from the smallest up.
        """
        task = self.task
        bits = self.bits if task.tuned_at is None else task.tuned_at

        def best(values: Sequence[float], arguments: Callable[[float, int], dict[str, Any]]) -> float:
            means: dict[float, float] = {}
            for value in sorted(values):
                found = self.outcomes([arguments(value, seed) for seed in task.trial_seeds])
                means[value] = mean(outcome["validation"] for outcome in found)
                if means[value] < max(means.values()) - GIVE_UP:
                    break
            return max(means, key=means.__getitem__)

        count = task.images_per_class
        lr = best(task.learning_rates, lambda v, seed: self.arguments("trial", bits, QAT, seed, v, None, count))
        needed = {task.radius_of(m) for m in self.args.methods if METHODS[m].saq is not None}
        radii = {}
        for name in METHODS:
            if name in needed:
                values = task.adaptive_radii if "adaptive" in (METHODS[name].saq or {}) else task.radii
                radii[name] = best(
                    values,
                    lambda v, seed, name=name: self.arguments("trial", bits, name, seed, lr, v, count),  # type: ignore[misc]
                )
        return lr, radii

    def arguments(
        self, kind: str, bits: int, method: str, seed: int, lr: float, rho: float | None, count: int | None
    ) -> dict[str, Any]:
        """All that an outcome depends on, JSON-plain."""
        task, way = self.task, METHODS[method]
        plain = way.saq is None
        return {
            "kind": kind,
            "task": self.task_name,
            "bits": bits,
            "method": method,
            "seed": seed,
            "saq": None if plain else {"rho": rho, **(way.saq or {})},
            "lr": lr,
            "steps": task.steps * way.length,
            "batch_size": task.batch_size,
            "optimizer": task.optimizer,
            "weight_decay": task.weight_decay,
            "distill_alpha": way.distill_alpha,
            "images_per_class": count,
            "test_images": task.test_images,
            "quantization": task.quantization,
            "device": self.args.device,
        }

    def outcomes(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """In the order of `jobs`; those that are not stored yet are run in the pool."""

        def outcome(arguments: dict[str, Any]) -> dict[str, Any]:
            once = self.runs.once(
                file_name(arguments, self.task),
                arguments,
                lambda: self.pool.submit(train_one, arguments, self.paths).result(),
            )
            return once["outcome"]

        with ThreadPoolExecutor(max(1, len(jobs))) as threads:
            return list(threads.map(outcome, jobs))


def file_name(arguments: dict[str, Any], task: Task) -> str:
    """Such as `digits-w2-case-3-seed0`; `-n30` where the number of images is not the task's, settings of a trial."""
    parts = [arguments["task"], f"w{arguments['bits']}"]
    if arguments["images_per_class"] != task.images_per_class:
        parts.append(f"n{arguments['images_per_class']}")
    parts.append(arguments["method"].replace(", ", "-").replace(" ", "-"))
    if arguments["kind"] == "trial":
        parts += ["trial", f"lr{arguments['lr']:g}"]
        parts += [f"rho{arguments['saq']['rho']:g}"] if arguments["saq"] else []
    return "-".join([*parts, f"seed{arguments['seed']}"])

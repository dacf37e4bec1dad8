"""One task at one number of bits: learning rates and radii are chosen, then all methods run on all seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..shared.runs import Runs, fingerprint_of
from .arguments import AccuracyArguments
from .choosing import Chosen, choose
from .methods import METHODS
from .task import Paths, Task
from .tasks import TASKS
from .training import float_state, train_one


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

    @property
    def trials(self) -> Runs:
        """Where runs are that settings are chosen by."""
        return self.runs if self.args.trials is None else Runs(Path(self.args.trials), self.runs.command)

    def run(self) -> None:
        chosen = self.chosen()
        counts: Sequence[int | None] = self.args.images_per_class or [self.task.images_per_class]
        for count in counts:
            jobs = [  # seed by seed: an interrupted sweep has complete pairs
                self.arguments("run", self.bits, name, seed, *chosen[name], count)
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

    def chosen(self) -> dict[str, Chosen]:
        """What each method trains with, at these bits or at those that the task is tuned at."""
        chosen = choose(self.task, self.args.methods, self.validation)
        return {
            name: settings._replace(rho=METHODS[name].radii.get(self.task_name, settings.rho))
            for name, settings in chosen.items()
        }

    def validation(self, method: str, settings: Chosen) -> float:
        """Mean validation accuracy of the trials of `method`."""
        task = self.task
        bits = self.bits if task.tuned_at is None else task.tuned_at
        if task.tuned_as is not None:
            return mean(self.validation_of(task.tuned_as, bits, method, seed, settings) for seed in task.trial_seeds)
        found = self.outcomes(
            [
                self.arguments("trial", bits, method, seed, settings.lr, settings.rho, task.images_per_class)
                for seed in task.trial_seeds
            ]
        )
        return mean(outcome["validation"] for outcome in found)

    def validation_of(self, other: str, bits: int, method: str, seed: int, settings: Chosen) -> float:
        """Validation accuracy of a stored trial of the task `other`, whatever device it ran on.

        Raises:
            ValueError: If there is no such trial.
        """
        study = replace(self, task_name=other)
        count = study.task.images_per_class
        name = file_name(study.arguments("trial", bits, method, seed, *settings, count), study.task)
        record = self.trials.stored(name)
        if record is None:
            raise ValueError(
                f"{self.task_name}: takes learning rates and radii from trials of {other}; found no {name}.json in "
                f"{self.trials.directory}. Run the trials of {other} first, for the methods that are asked for."
            )
        return record["outcome"]["validation"]

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
            # Runs that were stored before there was a choice keep the arguments that they were stored with.
            **({} if task.precision == "float32" else {"precision": task.precision}),
            **way.control,
        }

    def outcomes(
        self, jobs: list[dict[str, Any]], name_of: Callable[[dict[str, Any]], str] | None = None
    ) -> list[dict[str, Any]]:
        """In the order of `jobs`; those that are not stored yet, under their [`file_name`] or that of `name_of`, are
        run in the pool."""

        def outcome(arguments: dict[str, Any]) -> dict[str, Any]:
            once = (self.trials if arguments["kind"] == "trial" else self.runs).once(
                name_of(arguments) if name_of else file_name(arguments, self.task),
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

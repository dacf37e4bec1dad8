"""Is the training of a task long enough? Plain QAT with its number of steps, twice and four times as many.

    python -m benchmarks.accuracy.convergence --task flowers-vit --bits 4
    python -m benchmarks.accuracy.convergence --task flowers-vit --bits 4 --steps 240 480 960 --learning_rates 3e-4

A method that only repairs training that was cut short must not look like one that trains better. So the steps of a
task are to be so many that twice as many change plain QAT by less than 0.3 points, each length at the best of the
learning rates. Only validation images are looked at. One JSON for each run, whose name tells its steps: they stay
valid when the steps of a task are changed. What is there is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from ..shared.command_line import parsed
from ..shared.markdown import head, row
from ..shared.paired import Difference, difference
from ..shared.places import RESULTS
from ..shared.runs import Runs
from .arguments import AccuracyArguments
from .methods import QAT
from .study import Study
from .sweep import is_at_hand
from .tasks import TASKS
from .training import ensure_float_model, workers

LENGTHS = (1, 2, 4)
ENOUGH = 0.3
"""Points that twice as many steps may change."""
TRIAL_SEEDS = 100
"""The first of the seeds that something is chosen with."""


@dataclass
class ConvergenceArguments(AccuracyArguments):
    """Which task, and how long. The options of the sweep say where data are."""

    task: str = field(default="flowers-vit", metadata={"help": "A task of the sweep."})
    steps: list[int] | None = field(default=None, metadata={"help": "Default: the task's, twice and four times that."})
    learning_rates: list[float] | None = field(default=None, metadata={"help": "Default: the task's."})
    seeds: list[int] = field(default_factory=lambda: [100, 101], metadata={"help": "For each length."})
    results: str = field(default=f"{RESULTS}/convergence", metadata={"help": "Where the JSON results go."})

    def __post_init__(self) -> None:
        self.tasks = [self.task]
        super().__post_init__()

    def check_seeds(self) -> None:
        if min(self.seeds) < TRIAL_SEEDS:
            raise ValueError(
                f"--seeds {self.seeds}: expected {TRIAL_SEEDS} and more; those below are for runs that are tested."
            )


@dataclass(frozen=True)
class Length:
    """Runs of one number of steps: validation accuracy in percent, by learning rate and seed."""

    steps: int
    percent: dict[float, dict[int, float]]

    @property
    def best(self) -> float:
        """The learning rate with the highest mean, the smaller of equals."""
        return max(sorted(self.percent), key=lambda lr: mean(self.percent[lr].values()))

    def minus(self, other: Length) -> Difference:
        """Each at its best learning rate, by seed."""
        found = difference(self.percent[self.best], other.percent[other.best])
        assert found is not None
        return found


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(ConvergenceArguments, argv, "benchmarks.accuracy.convergence", __doc__)
    paths = args.paths()
    if not is_at_hand(args.task, paths):
        return
    with workers(args.processes) as pool:
        if not TASKS[args.task].float_per_seed:
            pool.submit(ensure_float_model, args.task, paths).result()
        for bits in args.bits or TASKS[args.task].bits:
            study = Study(args.task, bits, args, paths, Runs(Path(args.results), command), pool)
            print(report(study, lengths_of(study, args)), flush=True)


def lengths_of(study: Study, args: ConvergenceArguments) -> list[Length]:
    """All runs, shortest first."""
    task = study.task
    lengths = sorted(args.steps or [task.steps * times for times in LENGTHS])
    rates = args.learning_rates or list(task.learning_rates)
    keys = [(steps, lr, seed) for steps in lengths for lr in rates for seed in args.seeds]
    outcomes = study.outcomes([run_of(study, *key) for key in keys], name_of)
    found = {steps: Length(steps, {lr: {} for lr in rates}) for steps in lengths}
    for (steps, lr, seed), outcome in zip(keys, outcomes, strict=True):
        found[steps].percent[lr][seed] = 100 * outcome["validation"]
    return list(found.values())


def run_of(study: Study, steps: int, lr: float, seed: int) -> dict[str, Any]:
    trial = study.arguments("trial", study.bits, QAT, seed, lr, None, study.task.images_per_class)
    return {**trial, "steps": steps}


def name_of(arguments: dict[str, Any]) -> str:
    """Such as `flowers-vit-w4-steps480-lr0.0003-seed100`."""
    a = arguments
    return f"{a['task']}-w{a['bits']}-steps{a['steps']}-lr{a['lr']:g}-seed{a['seed']}"


def report(study: Study, lengths: Sequence[Length]) -> str:
    """A table, and which length is enough."""
    lines = [
        f"{study.task.title}, W{study.bits}A{study.bits}: plain QAT on the validation images",
        "",
        *head("steps", "learning rate", "top-1 %", "minus the length before"),
    ]
    for number, length in enumerate(lengths):
        change = str(length.minus(lengths[number - 1])) if number else "-"
        best = length.best
        lines.append(row(str(length.steps), f"{best:g}", f"{mean(length.percent[best].values()):.2f}", change))
    changes = [(a, b.minus(a).mean) for a, b in zip(lengths, lengths[1:], strict=False)]
    enough = next((a.steps for a, change in changes if change < ENOUGH), None)
    said = "none of these is enough" if enough is None else f"{enough} steps are enough"
    return "\n".join([*lines, "", f"More steps bring less than {ENOUGH:g} points: {said}."])


if __name__ == "__main__":
    main()

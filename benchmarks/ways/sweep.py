"""Ways to pay less for sharpness, or to gain more from it, on two small tasks: which deserve a place in the package?

    python -m benchmarks.ways.sweep      # goes on where it was interrupted, and writes docs/ways.md

Float model of each seed -> quantized, calibrated, trained in every way from there. Written down before any reported
run was looked at:

- Every way has four trials on validation images, each with the same two seeds, which no reported run uses. Plain ways
  try four learning rates. The others try two of these at their first setting, then two more settings at the better
  rate; a setting is a radius, or a number of the way's own at the radius that the way it builds on has chosen.
- Batch-norm statistics are estimated anew on the training images for all ways, plain ones included.
- Ten seeds (sixteen were planned, the time for them was over), paired: one seed has the same images, float model and
  order of images in every way. Accuracy on test images after the last step.
- A way is worth keeping if the 95 % interval of its difference to what it builds on lies above zero on one task and
  not below zero on the other, and if it does not fall behind its rival, where the package has a way at its price.

After seven seeds had been seen, two things were changed. Averaged and frozen plain training had been given rates that
lacked QAT's own best on the CNN; their runs were discarded, and they now try QAT's rate and half of it. And controls
were added, which share the choices of a way: docs/protocol.md asks that a way beats its control as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import Runs
from .bundles import BundledRuns
from .page import write_page
from .tasks import TASKS
from .training import Work
from .ways import WAYS, Setting


@dataclass
class WayArguments:
    """What to run. Anything but the paths is stored with each result."""

    ways: list[str] = field(
        default_factory=lambda: list(WAYS),
        metadata={"help": "Ways to train; those that they build on, or take a radius from, are always among them."},
    )
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Models to train."})
    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Of images, weights, order."})
    trial_seeds: list[int] = field(
        default_factory=lambda: [100, 101], metadata={"help": "Those that settings are chosen on."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [4e-3, 8e-3], metadata={"help": "To choose from, of ways that perturb."}
    )
    plain_learning_rates: list[float] = field(
        default_factory=lambda: [2e-3, 4e-3, 8e-3, 1.2e-2],
        metadata={"help": "To choose from, of plain ways; as many as others have trials."},
    )
    pool: int = field(default=400, metadata={"help": "Images that training images are drawn from."})
    validation_images: int = field(default=697, metadata={"help": "Images to choose by; the rest is tested on."})
    float_epochs: int = field(default=30, metadata={"help": "Of the float model."})
    float_learning_rate: float = field(default=3e-3, metadata={"help": "Of the float model, not tuned."})
    epochs: int | None = field(default=None, metadata={"help": "Of quantized training; None: those of the task."})
    results: str = field(default=f"{RESULTS}/ways", metadata={"help": "Where the JSON results go."})
    document: str = field(default="docs/ways.md", metadata={"help": "The page to write."})

    def __post_init__(self) -> None:
        for name, known in (("ways", WAYS), ("tasks", TASKS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"--{name} {unknown}: unknown; expected some of {list(known)}.")
        if set(self.seeds) & set(self.trial_seeds):
            raise ValueError(f"--trial_seeds {self.trial_seeds}: expected none of the seeds {self.seeds}.")
        self.ways = needed(self.ways)


def needed(ways: Sequence[str]) -> list[str]:
    """List `ways` and all that they build on or take a radius from, in the order of `WAYS`."""
    wanted: set[str] = set()
    left = ["qat", *ways]
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            way = WAYS[name]
            left += [way.builds_on, way.radius_of or name, way.control or name, way.choice_of or name]
    return [name for name in WAYS if name in wanted]


class Choice(NamedTuple):
    """What the trials of a way have chosen."""

    lr: float
    rho: float
    own: dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(WayArguments, argv, "benchmarks.ways.sweep", __doc__)
    runs = BundledRuns(Path(args.results), command)
    work = Work(args.pool, args.validation_images)
    choices = {task: chosen(args, runs, task, work.run) for task in args.tasks}
    for seed in args.seeds:  # seed by seed: an interrupted run has complete pairs
        for task in args.tasks:
            for way in args.ways:
                arguments = arguments_of(args, "run", task, way, seed, choices[task][way])
                runs.once(f"{file_name(task, way)}/seed{seed}", arguments, partial(work.run, arguments))
    write_page(Path(args.results), Path(args.document))


def arguments_of(args: WayArguments, kind: str, task: str, way: str, seed: int, choice: Choice) -> dict[str, Any]:
    """Return everything that the outcome of a run depends on."""
    epochs = (args.epochs or TASKS[task].epochs) * WAYS[way].length
    shared = ("pool", "validation_images", "float_epochs", "float_learning_rate")
    own = {"kind": kind, "task": task, "way": way, "seed": seed, **choice._asdict(), "epochs": epochs}
    return own | {name: getattr(args, name) for name in shared}


def chosen(
    args: WayArguments, runs: Runs, task: str, run: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Choice]:
    """Choose learning rate and setting of each way by mean validation accuracy, the first of equals."""
    choices: dict[str, Choice] = {}

    def validation(way: str, choice: Choice) -> float:
        scores = []
        for seed in args.trial_seeds:
            arguments = arguments_of(args, "trial", task, way, seed, choice)
            own = "".join(f"-{name}{value:g}" for name, value in choice.own.items())
            name = f"{file_name(task, way)}/trial-lr{choice.lr:g}-rho{choice.rho:g}{own}-seed{seed}"
            scores.append(runs.once(name, arguments, partial(run, arguments))["outcome"]["validation"])
        return sum(scores) / len(scores)

    for name in args.ways:
        way = WAYS[name]
        if way.choice_of is not None:
            lr, rho, own = choices[way.choice_of]
            choices[name] = Choice(lr, round(rho / math.hypot(1, own.get("noise", 0)), 6), {})
            continue
        radius = choices[way.radius_of].rho if way.radius_of else TASKS[task].radius
        settings = way.settings or (Setting(),)
        rates = sorted(args.learning_rates if way.settings else args.plain_learning_rates)
        if way.saq is None and way.settings:
            rates = [choices[way.builds_on].lr / 2, choices[way.builds_on].lr]
        options = [Choice(lr, round(settings[0].factor * radius, 6), settings[0].own) for lr in rates]
        best = max(options, key=lambda choice: validation(name, choice))  # noqa: B023 (called at once)
        others = [Choice(best.lr, round(s.factor * radius, 6), s.own) for s in settings[1:]]
        choices[name] = max([best, *others], key=lambda choice: validation(name, choice))  # noqa: B023
    return choices


def file_name(task: str, way: str) -> str:
    short = way.replace(", ", "-").replace(" + ", "-with-").replace(" ", "-")
    return f"{task}-{short.replace('(', '').replace(')', '')}"


if __name__ == "__main__":
    main()

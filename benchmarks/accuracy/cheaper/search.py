"""Try the cheaper ways on validation images.

    python -m benchmarks.accuracy.cheaper.search --tasks flowers --seeds 100

On `flowers` all of them; on the task after it those that kept a part of the gain there (`HOPELESS`). One JSON for each
trial in benchmarks/results/cheaper; those that are there are not run again. docs/protocol.md has the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from ...shared.command_line import parsed
from ...shared.places import RESULTS
from ...shared.runs import Runs
from ..arguments import AccuracyArguments
from ..methods import QAT, SAQ
from ..tasks import TASKS as ALL_TASKS
from ..training import ensure_float_model, train_one, workers
from .ways import MOBILENET, RATES, REFERENCES, SEEDS, TASKS, WAYS

BITS = 4
HOPELESS = 1 / 2
"""Share of the gain of two passes that a way must have kept on the first task to be tried on the next."""


@dataclass
class SearchArguments:
    """What to run."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"Some of {list(TASKS)}."})
    seeds: list[int] = field(default_factory=lambda: list(SEEDS), metadata={"help": f"Some of {list(SEEDS)}."})
    processes: int = field(default=1, metadata={"help": "Runs at the same time, each with one thread."})
    results: str = field(default=f"{RESULTS}/cheaper", metadata={"help": "Where the JSON results go."})
    cache: str = field(default="outputs/accuracy", metadata={"help": "Decoded images and float models."})

    def __post_init__(self) -> None:
        unknown = {
            "tasks": [task for task in self.tasks if task not in TASKS],
            "seeds": [seed for seed in self.seeds if seed not in SEEDS],
        }
        for name, known in (("tasks", list(TASKS)), ("seeds", list(SEEDS))):
            if unknown[name]:
                raise ValueError(f"--{name} {unknown[name]}: unknown; expected some of {known}.")


def arguments_of(task_name: str, way_name: str, seed: int) -> dict[str, Any]:
    """All that an outcome depends on, JSON-plain, as `train_one` takes it."""
    task, way = ALL_TASKS[task_name], WAYS[way_name]
    plain, perturbed = RATES[task_name]
    return {
        "kind": "trial",
        "task": task_name,
        "bits": BITS,
        "method": way_name,
        "seed": seed,
        "saq": None if way.saq is None else {"rho": way.radii[task_name], **way.saq},
        "lr": plain if way.saq is None else perturbed,
        "steps": task.steps,
        "batch_size": task.batch_size,
        "optimizer": task.optimizer,
        "weight_decay": task.weight_decay,
        "distill_alpha": 0.0,
        "images_per_class": task.images_per_class,
        "quantization": task.quantization,
        "device": "cpu",
        "clean_batches": way.clean_batches,
    }


def name_of(arguments: dict[str, Any]) -> str:
    """Such as `flowers-every-8th-step-seed100`."""
    way = arguments["method"].replace(",", "").replace(" ", "-")
    return f"{arguments['task']}-{way}-seed{arguments['seed']}"


def kept(validation: dict[str, float]) -> dict[str, float]:
    """Share of the gain of two passes that each way keeps, from mean validation accuracies by way; none where two
    passes gain nothing."""
    gain = validation[SAQ] - validation[QAT]
    return {way: (found - validation[QAT]) / gain for way, found in validation.items()} if gain > 0 else {}


def worth_trying(stored: Runs, task_name: str) -> list[str]:
    """Ways to try on `task_name`: all on the first task; on others those that were not hopeless there."""
    if task_name == MOBILENET:
        return list(WAYS)
    found: dict[str, float] = {}
    for way in WAYS:
        records = [stored.stored(name_of(arguments_of(MOBILENET, way, seed))) for seed in SEEDS]
        missing = [seed for seed, record in zip(SEEDS, records, strict=True) if record is None]
        if missing:
            raise ValueError(
                f"{task_name}: ways to try there are chosen on {MOBILENET}; found no trial of {way!r} with seeds "
                f"{missing} in {stored.directory}. Run --tasks {MOBILENET} first."
            )
        found[way] = mean(record["outcome"]["validation"] for record in records if record is not None)
    shares = kept(found)
    return [way for way in WAYS if way in REFERENCES or shares.get(way, 1.0) >= HOPELESS]


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(SearchArguments, argv, "benchmarks.accuracy.cheaper.search", __doc__)
    runs = Runs(Path(args.results), command)
    paths = AccuracyArguments(cache=args.cache).paths()
    with workers(args.processes) as pool:
        for task_name in args.tasks:
            list(pool.map(ensure_float_model, [task_name], [paths]))
            jobs = [arguments_of(task_name, way, seed) for seed in args.seeds for way in worth_trying(runs, task_name)]

            def run(arguments: dict[str, Any]) -> None:
                runs.once(name_of(arguments), arguments, lambda: pool.submit(train_one, arguments, paths).result())

            with ThreadPoolExecutor(len(jobs)) as threads:  # they only wait for the pool
                list(threads.map(run, jobs))


if __name__ == "__main__":
    main()

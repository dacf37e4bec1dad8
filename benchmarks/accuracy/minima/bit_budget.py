"""Bits where they matter against the same bits everywhere: QAT after both, at the same bit operations.

    python -m benchmarks.accuracy.minima.bit_budget        # goes on where it stopped
    python -m benchmarks.accuracy.minima.bit_budget --settings cifar-resnet:3 --seeds 10 11

The float model of a seed is quantized to the same bits everywhere and calibrated; `hf_saq.analysis.allocate_bits` then
gives each layer its bits, for the bit operations of those uniform ones, from training images alone. Both
models are trained alike: the same steps, images, order and learning rate, which the accuracy sweep chose for uniform
bits. First layer and head keep their 8 bits in both. One JSON for each allocation and each run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_saq.analysis import allocate_bits

from ...shared.command_line import parsed
from ...shared.runs import Runs
from ..methods import QAT
from ..study import Study, file_name
from ..sweep import is_at_hand
from ..training import prepared, scores, train, workers
from .flatness import FlatnessArguments
from .measured import chosen, images_looked_at, loss_of

CANDIDATES = (2, 3, 4, 6, 8)
IMAGES, BATCH, PASSES = 500, 125, 20.0
BY: Literal["noise", "measured"] = "noise"
MIXED = "bits by budget"


@dataclass
class BudgetArguments(FlatnessArguments):
    """Which models. The options of the sweep say where data are."""

    settings: list[str] = field(
        default_factory=lambda: ["cifar-resnet:3", "flowers:3"], metadata={"help": "Each a task and its bits."}
    )
    methods: list[str] = field(default_factory=lambda: [QAT], metadata={"help": "Ways to train both models."})


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(BudgetArguments, argv, "benchmarks.accuracy.minima.bit_budget", __doc__)
    paths, methods = args.paths(), list(args.methods)
    with workers(1) as pool:
        for task_name, bits in args.pairs:
            if is_at_hand(task_name, paths):
                study = Study(task_name, bits, args, paths, Runs(Path(args.results), command), pool)
                found = chosen(study, Path(args.trials), methods)
                for seed in args.seeds:
                    for name in methods:
                        job = study.arguments("run", bits, name, seed, *found[name], study.task.images_per_class)
                        pair(study, job)


def pair(study: Study, uniform: dict[str, Any]) -> None:
    """Train one model with the same bits everywhere and one with bits for the same budget."""
    mixed = with_bits_by_budget(study, uniform)
    for job, name in ((uniform, file_name(uniform, study.task)), (mixed, mixed_name(study, uniform))):
        # Runs whose minimum was looked at have more in their arguments, and the same outcome.
        if study.runs.stored(name) is None:
            study.runs.once(name, job, lambda job=job: one_run(job, study))  # type: ignore[misc]


def one_run(job: dict[str, Any], study: Study) -> dict[str, Any]:
    start = prepared(job, study.paths)
    return {**train(job, start), **scores(job, start)}


def mixed_name(study: Study, uniform: dict[str, Any]) -> str:
    return file_name({**uniform, "method": f"{uniform['method']}, {MIXED}"}, study.task)


def with_bits_by_budget(study: Study, uniform: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run whose layers get bits for the budget of `uniform`."""
    how = {
        "budget": f"{study.bits} bits",
        "by": BY,
        "candidates": list(CANDIDATES),
        "images": IMAGES,
        "passes": PASSES,
    }
    start_of = {key: uniform[key] for key in ("task", "bits", "seed", "images_per_class", "quantization", "device")}

    def allocate() -> dict[str, Any]:
        start = prepared(uniform, study.paths)
        begin = time.process_time()
        found = allocate_bits(
            start.model,
            images_looked_at(start, BATCH, IMAGES),
            how["budget"],  # type: ignore[arg-type]
            by=BY,
            candidates=CANDIDATES,
            passes=PASSES,
            inputs=images_looked_at(start, 1, 1)[0]["pixels"],
            loss=loss_of,
            progress=False,
        )
        return {**found.to_dict(), "cpu_seconds": time.process_time() - begin}

    record = study.runs.once(
        f"{study.task_name}-w{study.bits}-allocation-seed{uniform['seed']}", {**start_of, **how}, allocate
    )
    overrides = record["outcome"]["overrides"]
    return {**uniform, "quantization": {**uniform["quantization"], "overrides": overrides}, "allocation": how}


if __name__ == "__main__":
    main()

"""Is the minimum of SAQ flatter than that of plain QAT, and does flatness predict accuracy?

    python -m benchmarks.accuracy.minima.flatness        # goes on where it stopped
    python -m benchmarks.accuracy.minima.flatness --settings digits:2 --methods qat "case 3" --seeds 0 1

Every method starts from the float model of its seed, with the learning rate and radius that the accuracy sweep chose
on validation images. At each minimum `hf_saq.analysis.sharpness` looks at the training loss around `Q(w)`, on training
images without augmentation and with one radius for all methods of a task. For the first seed, landscapes of QAT and
SAQ are walked over as well. One JSON for each run; `page` makes docs/flatness.md of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_saq.analysis import landscape

from ...shared.command_line import parsed
from ...shared.places import RESULTS
from ...shared.runs import Runs
from ..arguments import AccuracyArguments
from ..methods import ADAPTIVE, BALANCED, ECHO, LONGER, METHODS, QAT, SAQ
from ..study import Study
from ..sweep import is_at_hand
from ..tasks import TASKS
from ..training import workers
from .measured import chosen, images_looked_at, look, loss_of, radii, trained

POINTS = 21
LANDSCAPES: dict[str, dict[str, Any]] = {
    "line": {"dimensions": 1, "places": ("quantized", "latent")},
    "plane": {"dimensions": 2, "places": ("quantized",)},
}


@dataclass
class FlatnessArguments(AccuracyArguments):
    """Which minima. The options of the sweep say where data are."""

    settings: list[str] = field(
        default_factory=lambda: ["digits:2", "digits-cnn:3"], metadata={"help": "Each a task and its bits."}
    )
    methods: list[str] = field(
        default_factory=lambda: [QAT, SAQ, ECHO, LONGER, BALANCED, "case 2", ADAPTIVE],
        metadata={"help": f"Some of {list(METHODS)}."},
    )
    results: str = field(default=f"{RESULTS}/minima", metadata={"help": "Where the JSON results go."})
    trials: str = field(default=f"{RESULTS}/accuracy", metadata={"help": "Trials that settings are taken from."})
    landscapes: bool = field(default=True, metadata={"help": "Walk over those of QAT and SAQ of the first seed."})

    def __post_init__(self) -> None:
        pairs = [setting.rpartition(":") for setting in self.settings]
        for (task, _, bits), setting in zip(pairs, self.settings, strict=True):
            if task not in TASKS or not bits.isdigit() or int(bits) not in TASKS[task].bits:
                known = [f"{name}:{b}" for name, found in TASKS.items() for b in found.bits]
                raise ValueError(f"--settings {setting}: unknown; expected a task and its bits, some of {known}.")
        self.tasks = list(dict.fromkeys(task for task, _, _ in pairs))
        super().__post_init__()
        self.pairs = [(task, int(bits)) for task, _, bits in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(FlatnessArguments, argv, "benchmarks.accuracy.minima.flatness", __doc__)
    paths, methods = args.paths(), list(args.methods)
    with workers(1) as pool:
        for task_name, bits in args.pairs:
            if is_at_hand(task_name, paths):
                run(Study(task_name, bits, args, paths, Runs(Path(args.results), command), pool), args, methods)


def run(study: Study, args: FlatnessArguments, methods: list[str]) -> None:
    """All methods of a task, seed by seed: what is interrupted has complete pairs."""
    found = chosen(study, Path(args.trials), list(dict.fromkeys([*methods, SAQ])))  # its radius measures all
    rho, adaptive_rho = radii(found)
    for number, seed in enumerate(args.seeds):
        jobs = {
            name: study.arguments("run", study.bits, name, seed, *found[name], study.task.images_per_class)
            for name in methods
        }
        for job in jobs.values():
            look(study, job, rho, adaptive_rho)
        if not number and args.landscapes and {QAT, SAQ} <= set(jobs):
            walk(study, {"QAT": jobs[QAT], "SAQ": jobs[SAQ]})


def walk(study: Study, jobs: dict[str, dict[str, Any]]) -> None:
    """Landscapes of models on one scale, along the same random directions."""
    for kind, options in LANDSCAPES.items():

        def over(options: dict[str, Any] = options) -> dict[str, Any]:
            starts = {name: trained(job, study.paths)[0] for name, job in jobs.items()}
            batches = images_looked_at(next(iter(starts.values())), study.task.batch_size)
            models = {name: start.model for name, start in starts.items()}
            return landscape(models, batches, points=POINTS, loss=loss_of, progress=False, **options).to_dict()

        told = {
            **jobs,
            "points": POINTS,
            **{name: list(v) if isinstance(v, tuple) else v for name, v in options.items()},
        }
        seed = next(iter(jobs.values()))["seed"]
        study.runs.once(f"{study.task_name}-w{study.bits}-{kind}-seed{seed}", told, over)


if __name__ == "__main__":
    main()

"""What each schedule keeps of the accuracy that SAQ gains, and what it costs: a tiny ViT on few digits, W2A2.

    python -m benchmarks.schedules.sweep      # what `make schedules` runs; goes on where it was interrupted

Float model of each seed -> quantized, calibrated, trained in every way from there -> docs/schedules.md. The learning
rate of plain QAT, and radius and learning rate of SAQ that perturbs every step, are chosen on images and seeds of
their own; all schedules use the latter two. Test images choose no value. `make step-cost` comes first: the page
takes the cost of a step from its results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..shared.command_line import parsed
from ..shared.digits_training import accuracy, load_split, quantized, tiny_vit, train
from ..shared.images import draw
from ..shared.places import RESULTS
from ..shared.runs import Runs, fingerprint_of
from ..shared.schedule_variants import ECHOED, FULL, QAT, VARIANTS, saq_config
from .page import write_page

LONGER = "qat, twice the epochs"
OWN_RADIUS: dict[str, list[float]] = {
    "adaptive": [1.25, 2.5, 5.0, 10.0],
    "previous": [0.125, 0.25, 0.5, 1.0],
    "stale 5": [0.25, 0.5, 1.0],
    "echo 2": [0.5, 1.0, 2.0],
    "echo 3": [0.5, 1.0, 2.0],
    "last eighth": [0.5, 1.0, 2.0, 4.0],
    ECHOED: [0.0],
}
"""Ways to train whose perturbation is not that of `full`, and the multiples of its radius that they choose from.

The radius of ASAM is in units of weights, and an `eps` made of other images does not find the steepest ascent. Echoed
batches at radius 0 are plain training that sees each batch twice: the control of `echo 2`."""


@dataclass
class ScheduleArguments:
    """What to run. Anything but the paths is stored with each result."""

    methods: list[str] = field(
        default_factory=lambda: [QAT, LONGER, *(name for name in VARIANTS if name != QAT)],
        metadata={"help": "Ways to train; qat and full are always among them."},
    )
    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Of images, weights, order."})
    trial_seeds: list[int] = field(
        default_factory=lambda: [100, 101], metadata={"help": "Those that learning rate and radius are chosen on."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [2e-3, 4e-3, 8e-3], metadata={"help": "To choose from."}
    )
    radii: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.8], metadata={"help": "To choose from."})
    pool: int = field(default=400, metadata={"help": "Images that training images are drawn from."})
    images: int = field(default=150, metadata={"help": "Training images of a seed."})
    validation_images: int = field(default=697, metadata={"help": "Images to choose by; the rest is tested on."})
    float_epochs: int = field(default=30, metadata={"help": "Of the float model."})
    float_learning_rate: float = field(default=3e-3, metadata={"help": "Of the float model, not tuned."})
    epochs: int = field(default=40, metadata={"help": "Of quantized training."})
    results: str = field(default=f"{RESULTS}/schedules", metadata={"help": "Where the JSON results go."})
    step_cost: str = field(
        default=f"{RESULTS}/step_cost/vit-small-images-batch16-processes1-cpu.json",
        metadata={"help": "The measured cost of a step."},
    )
    document: str = field(
        default="docs/schedules.md", metadata={"help": "The page to write; the plot goes beside it."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - {LONGER, *VARIANTS})
        if unknown:
            raise ValueError(f"--methods {unknown}: unknown; expected some of {[LONGER, *VARIANTS]}.")
        if set(self.seeds) & set(self.trial_seeds):
            raise ValueError(f"--trial_seeds {self.trial_seeds}: expected none of the seeds {self.seeds}.")
        if not 0 < self.images <= self.pool:
            raise ValueError(f"--images {self.images}: expected 1 to {self.pool}, the images to draw from.")
        self.methods = [m for m in (QAT, LONGER, *VARIANTS) if m in (QAT, FULL, *self.methods)]


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(ScheduleArguments, argv, "benchmarks.schedules.sweep", __doc__)
    runs = Runs(Path(args.results), command)
    work = Work(args)
    qat_rate, rate, radii = chosen(args, runs, work)
    for seed in args.seeds:  # seed by seed: an interrupted run has complete pairs
        for method in args.methods:
            plain = method in (QAT, LONGER)
            epochs = args.epochs * (2 if method == LONGER else 1)
            rho = None if plain else radii.get(method, radii[FULL])
            arguments = work.arguments("run", method, seed, qat_rate if plain else rate, rho, epochs)
            runs.once(f"{file_name(method)}-seed{seed}", arguments, partial(work.run, arguments))
    write_page(Path(args.results), Path(args.step_cost), Path(args.document))


class Work:
    """Data, float models (made once for each seed) and runs."""

    def __init__(self, args: ScheduleArguments):
        self.args = args
        self.pool, self.validation, self.test = load_split(args.pool, args.validation_images)
        self.float_model: Callable[[int], Any] = lru_cache(maxsize=2)(self._float_model)

    def _float_model(self, seed: int) -> dict[str, Any]:
        model = tiny_vit(seed)
        train(
            model, draw(self.pool, self.args.images, seed), self.args.float_epochs, self.args.float_learning_rate, seed
        )
        return model.state_dict()

    def arguments(
        self, kind: str, method: str, seed: int, lr: float, rho: float | None, epochs: int
    ) -> dict[str, Any]:
        shared = ("pool", "images", "validation_images", "float_epochs", "float_learning_rate")
        config = VARIANTS[QAT if method == LONGER else method]
        own: dict[str, Any] = {"kind": kind, "method": method, "config": config}
        own |= {"seed": seed, "lr": lr, "rho": rho, "epochs": epochs}
        return own | {key: getattr(self.args, key) for key in shared}

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Validation accuracy and, of a run that is no trial, test accuracy of one trained model."""
        seed = arguments["seed"]
        images, state = draw(self.pool, arguments["images"], seed), self.float_model(seed)
        model = quantized(state, images)
        saq = saq_config(arguments["rho"], arguments["config"])
        outcome = train(model, images, arguments["epochs"], arguments["lr"], seed, saq)
        outcome["validation"] = accuracy(model, self.validation)
        outcome["float_model"] = fingerprint_of(state)
        if arguments["kind"] == "run":
            outcome["test"] = accuracy(model, self.test)
            float_model = tiny_vit(seed)
            float_model.load_state_dict(state)
            outcome["float_test"] = accuracy(float_model, self.test)
        return outcome


def chosen(args: ScheduleArguments, runs: Runs, work: Work) -> tuple[float, float, dict[str, float]]:
    """Learning rate of plain QAT, learning rate of SAQ, and radii by method; `full` for all without their own.

    Each is the best in mean validation accuracy, the smaller of equals. The radius is chosen at the learning rate of
    QAT, then the learning rate once more at that radius, then the radii of `OWN_RADIUS`.
    """

    def validation(method: str, lr: float, rho: float | None) -> float:
        scores = []
        for seed in args.trial_seeds:
            arguments = work.arguments("trial", method, seed, lr, rho, args.epochs)
            name = f"trial-{file_name(method)}-lr{lr:g}" + ("" if rho is None else f"-rho{rho:g}") + f"-seed{seed}"
            scores.append(runs.once(name, arguments, partial(work.run, arguments))["outcome"]["validation"])
        return sum(scores) / len(scores)

    def best(values: Sequence[float], score: Callable[[float], float]) -> float:
        return max(sorted(values), key=score)

    qat_rate = best(args.learning_rates, lambda lr: validation(QAT, lr, None))
    radius = best(args.radii, lambda rho: validation(FULL, qat_rate, rho))
    rate = best(args.learning_rates, lambda lr: validation(FULL, lr, radius))
    radii = {FULL: radius}
    for method, factors in OWN_RADIUS.items():
        if method in args.methods:
            candidates = [round(factor * radius, 6) for factor in factors]
            radii[method] = best(candidates, lambda rho, method=method: validation(method, rate, rho))  # type: ignore[misc]
    return qat_rate, rate, radii


def file_name(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "-").replace("/", "-of-")


if __name__ == "__main__":
    main()

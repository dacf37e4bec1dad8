#!/usr/bin/env python
"""Does sharpness-aware quantization beat plain quantization-aware training? A sweep over tasks, bits and methods.

    python -m benchmarks.accuracy.sweep                     # what `make results` runs; goes on where it stopped
    python -m benchmarks.accuracy.sweep --tasks digits --bits 2 --methods qat "case 3" --seeds 0 1 --processes 2
    python -m benchmarks.accuracy.sweep --tasks digits --bits 2 --images_per_class 5 30 60 --methods qat "case 3"

For every task and number of bits: learning rate of plain QAT, then the radius of every case, chosen on validation
images with seeds of their own; then all methods on all seeds from the same float model. One JSON for each run;
`benchmarks/accuracy_page.py` makes docs/results.md of them.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import HfArgumentParser

from examples.distillation import distillation_loss
from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, quantize

from ..shared.images import Images, draw_per_class
from ..shared.runs import Runs, fingerprint_of
from ..shared.schedule_variants import saq_config
from ..shared.training_loop import Batch, accuracy, fit, logits_of, plain_loss
from .methods import DEFAULT, METHODS, QAT
from .task import Data, Paths, Task
from .tasks import TASKS

CALIBRATION_BATCHES, CALIBRATION_BATCH = 2, 128
DISTILL_TEMPERATURE = 2.0
GIVE_UP = 0.05
"""Values are no longer tried once one is this much worse in validation accuracy than the best so far."""


@dataclass
class AccuracyArguments:
    """What to run. Everything an outcome depends on is stored with it."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"Some of {', '.join(TASKS)}."})
    methods: list[str] = field(default_factory=lambda: list(DEFAULT), metadata={"help": f"Some of {list(METHODS)}."})
    bits: list[int] | None = field(default=None, metadata={"help": "Of weights and activations; default: the task's."})
    seeds: list[int] = field(default_factory=lambda: list(range(5)), metadata={"help": "Of images, order, dropout."})
    images_per_class: list[int] | None = field(
        default=None, metadata={"help": "Instead of the task's own number, with the learning rate and radii for that."}
    )
    processes: int = field(default=1, metadata={"help": "Runs at the same time, each with one thread."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    results: str = field(default="benchmarks/results/accuracy", metadata={"help": "Where the JSON results go."})
    cache: str = field(default="outputs/accuracy", metadata={"help": "Decoded images and float models."})
    flowers: str = field(default="../shared/data/flowers102", metadata={"help": "Flowers-102 as parquet files."})
    mobilenet: str = field(default="../shared/data/mobilenet_v2-imagenet", metadata={"help": "MobileNetV2 1.0, 224."})
    cifar: str = field(default="../shared/data/cifar10-jpeg", metadata={"help": "CIFAR-10 as parquet files."})
    resnet20: str = field(
        default="../shared/data/cifar10-resnet20/resnet20-12fca82f.th", metadata={"help": "Weights of ResNet-20."}
    )

    def __post_init__(self) -> None:
        for name, found, known in (("tasks", self.tasks, TASKS), ("methods", self.methods, METHODS)):
            unknown = sorted(set(found) - set(known))
            if unknown:
                raise ValueError(f"--{name} {unknown}: unknown; expected some of {list(known)}.")
        trials = {seed for name in self.tasks for seed in TASKS[name].trial_seeds}
        if set(self.seeds) & trials:
            raise ValueError(f"--seeds {self.seeds}: expected none of {sorted(trials)}, which radii are chosen with.")
        possible = {bits for name in self.tasks for bits in TASKS[name].bits}
        if self.bits is not None and not set(self.bits) & possible:
            raise ValueError(
                f"--bits {self.bits}: none of the tasks {self.tasks} has these; found {sorted(possible)}."
            )
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: expected at least one.")

    def paths(self) -> Paths:
        return Paths(*(Path(p) for p in (self.flowers, self.mobilenet, self.cifar, self.resnet20, self.cache)))


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(AccuracyArguments)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(given)
    runs = Runs(Path(args.results), shlex.join(["python", "-m", "benchmarks.accuracy.sweep", *given]))
    paths = args.paths()
    tasks = [name for name in args.tasks if is_at_hand(name, paths)]
    with workers(args.processes) as pool:
        shared = [name for name in tasks if not TASKS[name].float_per_seed]
        list(pool.map(ensure_float_model, shared, [paths] * len(shared)))  # made once, before many ask for it
        studies = [
            Study(name, bits, args, paths, runs, pool)
            for name in tasks
            for bits in args.bits or TASKS[name].bits
            if bits in TASKS[name].bits
        ]
        with ThreadPoolExecutor(max(1, len(studies))) as threads:  # they only wait for the pool
            for future in [threads.submit(study.run) for study in studies]:
                future.result()


def is_at_hand(task_name: str, paths: Paths) -> bool:
    """Whether the data of a task is there; says what is missing if it is not."""
    missing = {
        option: getattr(paths, option) for option in TASKS[task_name].needs if not getattr(paths, option).exists()
    }
    for option, path in missing.items():
        print(f"{task_name}: skipped, {path} is not there; name another place with --{option}.", flush=True)
    return not missing


def workers(processes: int) -> Executor:
    """What computes: this very process if there is to be one. One thread each: models and images are small."""
    if processes == 1:
        return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    return ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))


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


# In the processes of the pool ----------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def images_of(task_name: str, paths: Paths) -> Data:
    return TASKS[task_name].load(paths)


def ensure_float_model(task_name: str, paths: Paths) -> None:
    float_state(task_name, paths, None, 0)


@lru_cache(maxsize=4)
def float_state(task_name: str, paths: Paths, count: int | None, seed: int) -> dict[str, Tensor]:
    """The float model's weights; one that all seeds share is kept in the cache."""
    task, data = TASKS[task_name], images_of(task_name, paths)
    if task.float_per_seed:
        return task.train_float(paths, data, drawn(data, count, seed), seed).state_dict()
    stored = paths.cache / f"{task_name}-float.safetensors"
    if not stored.is_file():
        state = task.train_float(paths, data, data.training, 0).state_dict()
        stored.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in state.items()}, stored)
    return load_file(stored)


def drawn(data: Data, count: int | None, seed: int) -> Images:
    return data.training if count is None else draw_per_class(data.training, count, seed)


def train_one(arguments: dict[str, Any], paths: Paths) -> dict[str, Any]:
    """Quantize, calibrate, train and score one model: validation accuracy and, if it is no trial, test accuracy."""
    task, data = TASKS[arguments["task"]], images_of(arguments["task"], paths)
    seed, count, device = arguments["seed"], arguments["images_per_class"], torch.device(arguments["device"])
    images = drawn(data, count, seed)
    state = float_state(
        arguments["task"], paths, count if task.float_per_seed else None, seed if task.float_per_seed else 0
    )
    float_model = task.build()
    float_model.load_state_dict(copy.deepcopy(state))
    bits = arguments["bits"]
    config = SAQQuantizationConfig(weight_bits=bits, activation_bits=bits, **arguments["quantization"])
    layout = torch.channels_last if task.channels_last else torch.contiguous_format
    model = quantize(copy.deepcopy(float_model), config).to(device, memory_format=layout)  # type: ignore[call-overload]
    shown = data.evaluation_batches(images[slice(0, CALIBRATION_BATCHES * CALIBRATION_BATCH)], CALIBRATION_BATCH)
    calibrate(model, [moved(batch, device, layout)["pixels"] for batch in shown])
    saq = None if arguments["saq"] is None else saq_of(arguments["saq"])
    torch.manual_seed(seed)  # of dropout
    outcome = fit(
        model,
        (moved(batch, device, layout) for batch in data.training_batches(images, task.batch_size, seed)),
        arguments["steps"],
        task.optimizer_of(model, arguments["lr"]),
        saq,
        plain_loss
        if not arguments["distill_alpha"]
        else partial(distilled, teacher(float_model, device), arguments["distill_alpha"]),
    )

    def score(scored: nn.Module, some: Images) -> float:
        return accuracy(scored.to(device), (moved(batch, device, layout) for batch in data.evaluation_batches(some)))

    outcome["validation"] = score(model, data.validation)
    outcome["float_model"] = fingerprint_of(state)
    outcome["training_images"] = len(images)
    if arguments["kind"] == "run":
        test = data.test[slice(0, arguments["test_images"])]
        outcome["test"] = score(model, test)
        outcome["float_test"] = score(float_model, test)
    return outcome


def saq_of(stored: dict[str, Any]) -> SAQConfig:
    fields = dict(stored)
    return saq_config(fields.pop("rho"), fields)


def moved(batch: Batch, device: torch.device, layout: torch.memory_format) -> Batch:
    pixels = batch["pixels"].to(device, memory_format=layout)
    return {"pixels": pixels, "labels": batch["labels"].to(device)}


def teacher(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def distilled(float_model: nn.Module, alpha: float, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        expected = logits_of(float_model, batch["pixels"])
    found = logits_of(model, batch["pixels"])
    return distillation_loss(found, expected, batch["labels"], alpha, DISTILL_TEMPERATURE)


if __name__ == "__main__":
    main()

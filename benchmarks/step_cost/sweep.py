#!/usr/bin/env python
"""What a training step costs under each schedule: ratios to plain QAT in time and in memory, compared within one run.

    python -m benchmarks.step_cost.sweep          # what `make step-cost` runs; goes on where it was interrupted
    python -m benchmarks.step_cost.sweep --models vit-tiny vit-small vit-base resnet18 resnet50 --batch_sizes 1 4
    torchrun --nproc_per_node 2 -m benchmarks.step_cost.sweep --models vit-small-images

Every round runs all ways to train one after the other, in an order of its own, on one model and one optimizer; a ratio
is the median over rounds. A schedule with a period is timed over whole periods. Processor time is counted unless
`--clock wall`: other programs disturb it less. One JSON for each model, batch size and number of processes.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.quantizers import set_backend
from hf_saq.sharpness.perturbed_tensors import quantized_weights
from hf_saq.sharpness.schedules.step import ScheduledStep
from hf_saq.sharpness.schedules.trigger import NormTrigger
from hf_saq.training.parameter_groups import parameter_groups

from ..shared.runs import Runs
from ..shared.schedule_variants import QAT, VARIANTS, saq_config
from .allocator import allocator_settings
from .latent_sam import latent_sam_step
from .models import CLASSES, MODELS
from .peak_memory import peak_bytes

BITS = 4
RHO = 0.05
LEARNING_RATE = 1e-5
TOTAL_STEPS = 10**6
"""Far more than are run: progress stays at zero."""
FLOAT, AGAIN, SAM = "float", "qat again", "sam on latent weights"
WAYS: dict[str, dict[str, Any] | None] = {
    FLOAT: None,
    QAT: VARIANTS[QAT],
    AGAIN: VARIANTS[QAT],
    SAM: None,
    # Half of the steps at cost 1, half at cost 2: that follows from `full`, and no step is of another kind.
    **{name: config for name, config in VARIANTS.items() if name not in (QAT, "start 0.5")},
}
"""Fields of `SAQConfig` of each way to train, `None` for what is no SAQ. `qat again` shows how exact a ratio is.

Presets are among them, under the names of what they stand for."""


class EverySecond(NormTrigger):
    """Decides as ever and then fires at every second step, so that the cost of one that fires can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def fires(self, squared_norm: float, progress: float) -> bool:
        super().fires(squared_norm, progress)
        self.count += 1
        return self.count % 2 == 0


@dataclass
class CostArguments:
    """What to measure. Anything but the paths is stored with each result."""

    models: list[str] = field(
        default_factory=lambda: ["vit-small-images", "resnet18-small-images"],
        metadata={"help": f"Some of {', '.join(MODELS)}."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [16], metadata={"help": "Images of a step on a process."})
    ways: list[str] = field(
        default_factory=lambda: list(WAYS), metadata={"help": "Ways to train; qat is always among them."}
    )
    rounds: int = field(default=5, metadata={"help": "How often each way is timed."})
    steps: int = field(default=2, metadata={"help": "Steps in a row; one period where that is longer."})
    clock: str = field(default="process", metadata={"help": "process (processor time) or wall."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda; on cuda the clock must be wall."})
    backend: str = field(default="eager", metadata={"help": "Of fake quantization: eager or compiled."})
    results: str = field(default="benchmarks/results/step_cost", metadata={"help": "Where the JSON results go."})

    def __post_init__(self) -> None:
        for name, found, known in (("models", self.models, MODELS), ("ways", self.ways, WAYS)):
            unknown = sorted(set(found) - set(known))
            if unknown:
                raise ValueError(f"--{name} {unknown}: unknown; expected some of {sorted(known)}.")
        if self.clock not in ("process", "wall"):
            raise ValueError(f"--clock {self.clock}: expected process or wall.")
        if self.device != "cpu" and self.clock == "process":
            raise ValueError(f"--clock process does not see what {self.device} does; expected --clock wall.")
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(f"--rounds {self.rounds} --steps {self.steps}: expected at least one of each.")
        self.ways = [way for way in WAYS if way in (QAT, *self.ways)]


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(CostArguments)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(given)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    runs = Runs(Path(args.results), shlex.join([*launcher.split(), "benchmarks/step_cost.py", *given]))
    shared = ("rounds", "steps", "clock", "device", "backend")
    before = set_backend(args.backend)
    try:
        for model in args.models:
            for batch_size in args.batch_sizes:
                arguments = {"model": model, "batch_size": batch_size, "processes": processes, "bits": BITS}
                arguments |= {"ways": {way: WAYS[way] for way in args.ways}}
                arguments |= {key: getattr(args, key) for key in shared}
                name = f"{model}-batch{batch_size}-processes{processes}-{args.device}"
                if processes == 1 or dist.get_rank() == 0:
                    show(runs.once(name, arguments, partial(measure, arguments)))
                elif not (runs.directory / f"{name}.json").is_file():  # the first process waits for this one
                    measure(arguments)
    finally:
        set_backend(before)
        if processes > 1:
            dist.destroy_process_group()


@dataclass
class Bench:
    """One model in float and quantized, each with its optimizer, and the batch they all train on.

    Attributes:
        wrapped: The quantized model as it is called: in DDP if there are several processes.
    """

    float_model: nn.Module
    float_optimizer: torch.optim.Optimizer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module
    batch: dict[str, Tensor]

    def backward(self, batch: dict[str, Tensor], reduce: bool = True) -> Tensor:
        skip = not reduce and isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if skip else nullcontext():  # type: ignore[operator]
            loss = cross_entropy(self.wrapped(batch["pixels"]), batch["labels"])
            loss.backward()
        return loss.detach()


def prepare(arguments: dict[str, Any]) -> Bench:
    """Random weights, images and labels; 4 bits, 8 in the first and last layer."""
    torch.manual_seed(0)
    kind, device = MODELS[arguments["model"]], torch.device(arguments["device"])
    float_model = kind.build().to(device).train()
    batch = {
        "pixels": torch.randn(arguments["batch_size"], 3, kind.image_size, kind.image_size, device=device),
        "labels": torch.randint(CLASSES, (arguments["batch_size"],), device=device),
    }
    model = quantize(
        copy.deepcopy(float_model),
        SAQQuantizationConfig(weight_bits=arguments["bits"], activation_bits=arguments["bits"]),
    )
    calibrate(model, [batch["pixels"]])
    model.train()

    def wrap(m: nn.Module) -> nn.Module:
        return DistributedDataParallel(m) if arguments["processes"] > 1 else m

    def adamw(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(m, LEARNING_RATE), lr=LEARNING_RATE, fused=True)

    float_optimizer, optimizer = adamw(float_model), adamw(model)
    return Bench(wrap(float_model), float_optimizer, model, optimizer, wrap(model), batch)


@contextmanager
def one_step_of(way: str, bench: Bench) -> Iterator[tuple[Callable[[], object], int]]:
    """A function that takes one optimizer step, and after how many of them the kinds of steps repeat.

    The model is afterwards as if no minimizer had ever been there.
    """
    config = WAYS[way]
    if way == FLOAT:

        def float_step() -> None:
            cross_entropy(bench.float_model(bench.batch["pixels"]), bench.batch["labels"]).backward()
            bench.float_optimizer.step()
            bench.float_optimizer.zero_grad()

        yield float_step, 1
    elif way == SAM:
        backward = partial(bench.backward, bench.batch)
        yield lambda: latent_sam_step(bench.model, bench.optimizer, RHO, backward), 1
    elif config is None or config.get("case", 3) is None:

        def plain_step() -> None:
            bench.backward(bench.batch)
            bench.optimizer.step()
            bench.optimizer.zero_grad()

        yield plain_step, 1
    else:
        saq = saq_config(RHO, config)
        schedule = saq.perturbation_schedule()
        minimizer = SharpnessAwareMinimizer(bench.model, RHO, saq.case, saq.adaptive)  # type: ignore[arg-type]
        scheduled = ScheduledStep(minimizer, schedule)
        scheduled.trigger = EverySecond()
        taken = 0

        def scheduled_step() -> None:
            nonlocal taken
            scheduled.micro_batch(0, [bench.batch], bench.backward, taken, TOTAL_STEPS)
            bench.optimizer.step()
            bench.optimizer.zero_grad()
            taken += 1

        try:
            yield scheduled_step, 2 if schedule.trigger else schedule.interval
        finally:
            minimizer.detach()


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """Ratios of time and bytes of memory for every way to train."""
    bench = prepare(arguments)
    device = torch.device(arguments["device"])
    now = time.process_time if arguments["clock"] == "process" else time.perf_counter
    load_before = os.getloadavg()
    seconds: dict[str, list[float]] = {way: [] for way in arguments["ways"]}
    order, shuffled = list(seconds), random.Random(0)
    for number in range(arguments["rounds"] + 1):
        shuffled.shuffle(order)
        for way in order:
            with one_step_of(way, bench) as (step, period):
                steps = -(-arguments["steps"] // period) * period
                if period == 1:
                    step()  # with reuse="previous" the first one finds nothing of an earlier one
                synchronize(device)
                started = now()
                for _ in range(steps if number else 1):
                    step()
                synchronize(device)
                if number:  # in round 0 memory is allocated for the first time
                    seconds[way].append((now() - started) / steps)
    found = {
        "times": {way: compared(values, seconds[QAT]) for way, values in seconds.items()},
        "seconds_of_qat": statistics.median(seconds[QAT]),
        "bytes": memory(list(seconds), bench, device),
        "quantized_weight_bytes": sum(
            e.weight.numel() * e.weight.element_size() for e in quantized_weights(bench.model)
        ),
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "threads": torch.get_num_threads(),
        "allocator": allocator_settings(),
        "load_average_before_and_after": [load_before, os.getloadavg()],
        "timm": importlib.metadata.version("timm"),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    return found


def compared(seconds: list[float], qat: list[float]) -> dict[str, float]:
    """Median and quartiles over rounds of the ratio to plain QAT in the same round."""
    ratios = [own / plain for own, plain in zip(seconds, qat, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return {"ratio": statistics.median(ratios), "lower_quartile": low, "upper_quartile": high}


def memory(ways: list[str], bench: Bench, device: torch.device) -> dict[str, int]:
    """Peak of a period of each way and one step more: parameters, buffers, optimizer state and all else alive."""
    found = {}
    for way in ways:
        own = (bench.float_model, bench.float_optimizer) if way == FLOAT else (bench.model, bench.optimizer)
        resident = [*own[0].parameters(), *own[0].buffers(), *bench.batch.values()]
        resident += [t for state in own[1].state.values() for t in state.values() if isinstance(t, Tensor)]
        with one_step_of(way, bench) as (step, period):

            def period_and_one(step: Callable[[], object] = step, period: int = period) -> None:
                for _ in range(period + 1):
                    step()

            found[way] = peak_bytes(period_and_one, resident, device)
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(record: dict[str, Any]) -> None:
    """Print the ratios, and peak memory beyond that of plain QAT in units of the quantized weights."""
    outcome = record["outcome"]
    for way, time_ratio in outcome["times"].items():
        extra = (outcome["bytes"][way] - outcome["bytes"][QAT]) / outcome["quantized_weight_bytes"]
        quartiles = f"[{time_ratio['lower_quartile']:.3f}, {time_ratio['upper_quartile']:.3f}]"
        print(f"{record['name']}  {way:<24} {time_ratio['ratio']:.3f} {quartiles}  memory {extra:+.2f}", flush=True)


if __name__ == "__main__":
    main()

"""What a training step costs under each schedule: ratios to plain QAT in time and in memory, compared within one run.

    python -m benchmarks.step_cost.sweep      # what `make step-cost` runs; goes on where it was interrupted
    python -m benchmarks.step_cost.sweep --models vit-tiny vit-small vit-base resnet18 resnet50 --batch_sizes 1 4
    torchrun --nproc_per_node 2 -m benchmarks.step_cost.sweep --models vit-small-images

Every round runs all ways to train one after the other, in an order of its own, on one model and one optimizer; a ratio
is the median over rounds. A schedule with a period is timed over whole periods. Processor time is counted unless
`--clock wall`: other programs disturb it less. One JSON for each model, batch size and number of processes.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_saq.quantizers import set_backend
from hf_saq.quantizers.kernels import Backend
from hf_saq.sharpness import quantized_weights

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import Runs, version_of
from ..shared.schedule_variants import QAT
from .allocator import allocator_settings
from .meter import synchronize
from .models import MODELS
from .page import more_memory
from .peak_memory import peak_bytes
from .ways import BITS, BY_DEFAULT, FLOAT, WAYS, Bench, one_step_of, prepare, untimed_steps


@dataclass
class CostArguments:
    """What to measure. Anything but the paths is stored with each result."""

    models: list[str] = field(
        default_factory=lambda: ["vit-small-images", "resnet18-small-images"],
        metadata={"help": f"Some of {', '.join(MODELS)}."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [16], metadata={"help": "Images of a step on a process."})
    ways: list[str] = field(
        default_factory=lambda: list(BY_DEFAULT), metadata={"help": "Ways to train; qat is always among them."}
    )
    rounds: int = field(default=5, metadata={"help": "How often each way is timed."})
    steps: int = field(default=2, metadata={"help": "Steps in a row; one period where that is longer."})
    clock: str = field(default="process", metadata={"help": "process (processor time) or wall."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda; on cuda the clock must be wall."})
    backend: Backend = field(default="eager", metadata={"help": "Of fake quantization: eager or compiled."})
    precision: str = field(default="float32", metadata={"help": "Of products: float32, or bfloat16 by autocast."})
    results: str = field(default=f"{RESULTS}/step_cost", metadata={"help": "Where the JSON results go."})

    def __post_init__(self) -> None:
        for name, found, known in (("models", self.models, MODELS), ("ways", self.ways, WAYS)):
            unknown = sorted(set(found) - set(known))
            if unknown:
                raise ValueError(f"--{name} {unknown}: unknown; expected some of {sorted(known)}.")
        if self.clock not in ("process", "wall"):
            raise ValueError(f"--clock {self.clock}: expected process or wall.")
        if self.device != "cpu" and self.clock == "process":
            raise ValueError(f"--clock process does not see what {self.device} does; expected --clock wall.")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"--precision {self.precision}: expected float32 or bfloat16.")
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(f"--rounds {self.rounds} --steps {self.steps}: expected at least one of each.")
        self.ways = [way for way in WAYS if way in (QAT, *self.ways)]


def main(argv: Sequence[str] | None = None) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    args, command = parsed(CostArguments, argv, "benchmarks.step_cost.sweep", __doc__, launcher)
    if processes > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    runs = Runs(Path(args.results), command)
    shared = ("rounds", "steps", "clock", "device", "backend")
    before = set_backend(args.backend)
    try:
        for model in args.models:
            for batch_size in args.batch_sizes:
                arguments = {"model": model, "batch_size": batch_size, "processes": processes, "bits": BITS}
                arguments |= {"ways": {way: WAYS[way] for way in args.ways}}
                arguments |= {key: getattr(args, key) for key in shared}
                if args.precision != "float32":  # runs that were stored before there was a choice say nothing
                    arguments["precision"] = args.precision
                name = f"{model}-batch{batch_size}-processes{processes}-{args.device}"
                if processes == 1 or dist.get_rank() == 0:
                    show(runs.once(name, arguments, partial(measure, arguments)))
                elif not (runs.directory / f"{name}.json").is_file():  # the first process waits for this one
                    measure(arguments)
    finally:
        set_backend(before)
        if processes > 1:
            dist.destroy_process_group()


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
                for _ in range(untimed_steps(way, period)):
                    step()
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
        "timm": version_of("timm"),
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


def show(record: dict[str, Any]) -> None:
    """Print the ratios, and peak memory beyond that of plain QAT in units of the quantized weights."""
    outcome = record["outcome"]
    for way, found in outcome["times"].items():
        quartiles = f"[{found['lower_quartile']:.3f}, {found['upper_quartile']:.3f}]"
        memory = f"memory {more_memory(outcome, way):+.2f}"
        print(f"{record['name']}  {way:<24} {found['ratio']:.3f} {quartiles}  {memory}", flush=True)


if __name__ == "__main__":
    main()

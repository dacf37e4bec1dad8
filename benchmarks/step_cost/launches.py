"""How many kernels a training step launches, and how often it waits for the device.

    python -m benchmarks.step_cost.launches --models vit-small --device cuda --precision bfloat16 --backend compiled

Counted by torch's profiler over one period of each way to train. On a GPU small kernels cost their launch, and a step
that reads a number back waits until everything before it is done. On CPU operators stand for launches, and reads of a
number for waits: that is a rehearsal of the count, not a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hf_saq.quantizers import set_backend

from ..shared.command_line import parsed
from ..shared.runs import Runs
from .sweep import CostArguments
from .ways import BITS, WAYS, one_step_of, prepare

LAUNCHES = {"cuda": ("cudaLaunchKernel", "cuLaunchKernel"), "cpu": ("aten::",)}
WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "cpu": ("aten::_local_scalar_dense",),
}
"""Starts of the names of what is counted, for each type of device."""


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(CostArguments, argv, "benchmarks.step_cost.launches", __doc__)
    runs = Runs(Path(args.results), command)
    before = set_backend(args.backend)
    try:
        for model in args.models:
            for batch_size in args.batch_sizes:
                arguments = {"model": model, "batch_size": batch_size, "processes": 1, "bits": BITS}
                arguments |= {"ways": args.ways, "device": args.device, "backend": args.backend}
                arguments |= {"precision": args.precision}
                name = f"launches-{model}-batch{batch_size}-{args.device}"
                record = runs.once(name, arguments, lambda a=arguments: measure(a))  # type: ignore[misc]
                for way, found in record["outcome"].items():
                    print(
                        f"{name}  {way:<24} {found['launches']:.0f} launches, {found['waits']:.1f} waits", flush=True
                    )
    finally:
        set_backend(before)


def measure(arguments: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Launches and waits of a step of each way to train, on average over a period."""
    bench = prepare(arguments)
    found = {}
    for way in (way for way in WAYS if way in arguments["ways"]):
        with one_step_of(way, bench) as (step, period):
            for _ in range(period + 1):  # what happens once: allocation, compilation
                step()
            found[way] = counted(step, period, torch.device(arguments["device"]).type)
    return found


def counted(step: Callable[[], object], times: int, device_type: str) -> dict[str, float]:
    """Launches and waits of one call of `step`, on average over `times`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device_type == "cuda" else [])
    with profile(activities=activities) as profiled:
        for _ in range(times):
            step()
    names = [event.name for event in profiled.events()]
    return {
        "launches": sum(name.startswith(LAUNCHES[device_type]) for name in names) / times,
        "waits": sum(name.startswith(WAITS[device_type]) for name in names) / times,
    }


if __name__ == "__main__":
    main()

"""Where the time of a training step goes, float and quantized: the table "A step in parts" of docs/cost.md.

    python -m benchmarks.step_cost.step_profile --output benchmarks/results/step_profile.json

Self time of each operation as torch's profiler counts it, added up by what the operation belongs to. Steps of the
float model and of the quantized one take turns. The profiler itself costs time, most where operations are small: the
sums are above those of `fake_quant.py`, and shares are what to read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from hf_saq.quantizers import affine, set_backend

from ..shared.places import RESULTS
from ..shared.runs import version_of
from .plain_steps import BITS, MODELS, quantized, training_step

FORWARD, BACKWARD = "quantize", "gradient of quantization"
BY_MARK = {f"part: {name}": name for name in (FORWARD, BACKWARD)} | {"FakeQuantizeBackward": BACKWARD}
"""Parts by the name of an event around the operation; the innermost counts."""
BY_OPERATION = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn"),
    "convolutions": ("aten::convolution", "aten::_convolution", "aten::mkldnn_convolution", "aten::thnn_conv"),
    "attention": ("aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash_attention"),
    "normalization": ("aten::native_layer_norm", "aten::native_batch_norm", "aten::layer_norm", "aten::batch_norm"),
    "activation functions": ("aten::gelu", "aten::relu", "aten::threshold", "aten::clamp_min"),
    "optimizer": ("Optimizer.step", "aten::_foreach", "aten::_fused"),
}
"""Parts by the beginning of the operation's name, or of that of one around it."""
PARTS = [FORWARD, BACKWARD, *BY_OPERATION, "the rest"]


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Inside, quantization appears in profiles under names of its own."""
    functions = {"quantize_forward": FORWARD, "quantize_backward": BACKWARD}
    before = {name: getattr(affine, name) for name in functions}

    def mark(function: Callable, part: str) -> Callable:
        def run(*args: Any) -> Any:
            with record_function(f"part: {part}"):
                return function(*args)

        return run

    for name, part in functions.items():
        setattr(affine, name, mark(before[name], part))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(affine, name, function)


def part_of(event: FunctionEvent) -> str:
    """What an operation belongs to: by the innermost event around it, itself included, that says so."""
    around: FunctionEvent | None = event
    while around is not None:
        for name, part in BY_MARK.items():
            if name in around.name:
                return part
        for part, beginnings in BY_OPERATION.items():
            if around.name.startswith(beginnings):
                return part
        around = around.cpu_parent
    return "the rest"


def milliseconds(step: Callable[[], object]) -> dict[str, float]:
    """Self time on the CPU of all operations of one call, by part."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    found: dict[str, float] = defaultdict(float)
    for event in profiled.events() or ():
        found[part_of(event)] += event.self_cpu_time_total / 1000
    return dict(found)


def profile_model(name: str, batch: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Medians over repetitions, of `float` and of `quantized`."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    x, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    steps = {"float": training_step(model, x, labels), "quantized": training_step(quantized(model, x), x, labels)}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[dict[str, float]]] = {way: [] for way in steps}
    for _ in range(repetitions):
        for way, step in steps.items():
            times[way].append(milliseconds(step))
    return {way: {part: median(t.get(part, 0.0) for t in found) for part in PARTS} for way, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=f"{RESULTS}/step_profile.json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    set_backend("eager")
    with marked():
        found = {name: profile_model(name, args.batch, args.repetitions) for name in args.models}
    setting = {
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "repetitions": args.repetitions,
        "bits": BITS,
        "versions": {name: version_of(name) for name in ("torch", "transformers", "timm")},
    }
    for name, ways in found.items():
        total = sum(ways["quantized"].values())
        for part in PARTS:
            before, after = ways["float"][part], ways["quantized"][part]
            print(f"{name} {part:32} {before:8.1f} {after:8.1f} ms {100 * after / total:5.1f} %", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"setting": setting, "milliseconds": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

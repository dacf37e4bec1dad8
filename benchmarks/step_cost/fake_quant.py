"""What fake quantization costs: ratios of times and of memory, everything compared within one run.

    python -m benchmarks.step_cost.fake_quant --output benchmarks/results/fake_quant.json

Three tables: a training step of plain quantization-aware training against one of the float model; forward and backward
of single layers against torchao and Brevitas (installed by the extra `benchmarks`, left out where missing); and bytes
that autograd keeps for the backward pass against those of the float model. Weights and activations have 4 bits, one
scale per tensor. Repetitions are interleaved and medians are compared, so that a load that comes and goes meets all
alike; `--clock process` counts processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_saq.quantizers import set_backend
from hf_saq.quantizers.kernels import Backend

from ..shared.places import RESULTS
from ..shared.runs import version_of
from .allocator import allocator_settings, page_faults
from .layers import LAYERS, UnfusedLSQ, brevitas_layer, forward_backward, torchao_layer
from .meter import Meter
from .plain_steps import BITS, MODELS, quantized, training_step


def with_backend(name: Backend, step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        before = set_backend(name)
        step()
        set_backend(before)

    return run


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass beyond parameters and buffers, each storage once."""
    not_counted = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in not_counted:
            kept[t.untyped_storage().data_ptr()] = t.detach()  # held, so that no address is used twice
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def model_table(names: list[str], batch: int, meter: Meter) -> tuple[dict, dict]:
    times, memory = {}, {}
    for name in names:
        model = MODELS[name]().to(meter.device).train()
        x = torch.randn(batch, 3, 224, 224, device=meter.device)
        labels = torch.randint(0, 1000, (batch,), device=meter.device)
        ours = quantized(model, x)
        floats, recomputed = kept_bytes(model, x), kept_bytes(ours, x)
        memory[name] = {"float_bytes": floats, "quantized_bytes": recomputed, "ratio": recomputed / floats}
        step = training_step(ours, x, labels)
        steps: dict[str, Callable[[], object]] = {
            "float": training_step(model, x, labels),
            "eager": with_backend("eager", step),
            "compiled": with_backend("compiled", step),
        }
        sharing = quantized(model, x, share_inputs=True)
        if sharing.quantization_report.shared_inputs:  # type: ignore[union-attr]
            steps["compiled, inputs shared"] = with_backend("compiled", training_step(sharing, x, labels))
        keeping = quantized(model, x, learn_input_scale=False)
        steps["eager, input scale kept"] = with_backend("eager", training_step(keeping, x, labels))
        both = quantized(model, x, share_inputs=True, learn_input_scale=False)
        steps["compiled, both"] = with_backend("compiled", training_step(both, x, labels))
        seconds = meter.medians(steps)
        faults = {key: statistics.median(page_faults(way) for _ in range(3)) for key, way in steps.items()}
        ratios = {key: seconds[key] / seconds["float"] for key in steps if key != "float"}
        times[name] = {"seconds": seconds, "ratio_to_float": ratios, "page_faults": faults}
        print(
            name, {k: round(v, 3) for k, v in ratios.items()}, f"memory {recomputed / floats:.3f}", faults, flush=True
        )
    return times, memory


def layer_table(meter: Meter) -> dict:
    table = {}
    for name, (make, shape) in LAYERS.items():
        layer = make().to(meter.device)
        x = torch.randn(shape, device=meter.device, requires_grad=True)
        grad = torch.randn_like(layer(x))
        ours = quantized(layer, x.detach())
        step = forward_backward(ours, x, grad)
        steps: dict[str, Callable[[], object]] = {
            "float": forward_backward(layer, x, grad),
            "eager": with_backend("eager", step),
            "compiled": with_backend("compiled", step),
            "unfused LSQ": forward_backward(UnfusedLSQ(layer, ours), x, grad),
        }
        for library, build in (("torchao", torchao_layer), ("brevitas", brevitas_layer)):
            try:
                other = build(layer)
            except ImportError as error:
                print(f"{library} is left out: {error}", flush=True)
                continue
            if other is not None:
                steps[library] = forward_backward(other.to(meter.device).train(), x, grad)
        seconds = meter.medians(steps)
        ratios = {key: value / seconds["float"] for key, value in seconds.items() if key != "float"}
        table[name] = {"seconds": seconds, "ratio_to_float": ratios}
        print(name, {k: round(v, 3) for k, v in ratios.items()}, flush=True)
    return table


def of_cpu() -> str:
    """What kind of CPU this is: on how fast it multiplies depends what passes over memory cost beside."""
    return f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=f"{RESULTS}/fake_quant.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall", help="process time is for CPU only")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=11, help="of a step; of a layer three times as many")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--skip-layers", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and args.clock == "process":
        parser.error("--clock process does not see what the GPU does")
    torch.manual_seed(0)
    load_before = os.getloadavg()
    layers = {} if args.skip_layers else layer_table(Meter(args.clock, 3 * args.repetitions, device))
    times, memory = model_table(args.models, args.batch, Meter(args.clock, args.repetitions, device))
    result = {
        "setting": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else of_cpu(),
            "clock": args.clock,
            "threads": torch.get_num_threads(),
            "load_average_before_and_after": [load_before, os.getloadavg()],
            "batch": args.batch,
            "repetitions": args.repetitions,
            "bits": BITS,
            "allocator": allocator_settings(),
            "versions": {name: version_of(name) for name in ("torch", "transformers", "timm", "torchao", "brevitas")},
        },
        "layers": layers,
        "training_step": times,
        "kept_for_backward": memory,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

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
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.quantizers import set_backend
from hf_saq.quantizers.kernels import Backend

from .allocator import allocator_settings, page_faults

BITS = 4
CONFIG = SAQQuantizationConfig(weight_bits=BITS, activation_bits=BITS, first_last_bits=None)


def vit_small() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**size, num_hidden_layers=12, num_labels=1000))  # type: ignore[call-arg]


def resnet18() -> nn.Module:
    import timm

    return timm.create_model("resnet18")


MODELS = {"vit_small_patch16_224": vit_small, "resnet18": resnet18}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 384-1536, 8x197 tokens": (lambda: nn.Linear(384, 1536), (8, 197, 384)),
    "linear 1536-384, 8x197 tokens": (lambda: nn.Linear(1536, 384), (8, 197, 1536)),
    "conv 64-64 3x3, 8x56x56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (8, 64, 56, 56)),
    "conv 256-256 3x3, 8x14x14": (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (8, 256, 14, 14)),
}


def quantized(model: nn.Module, x: Tensor) -> nn.Module:
    was_layer = isinstance(model, (nn.Linear, nn.Conv2d))
    model = quantize(nn.Sequential(copy.deepcopy(model)) if was_layer else copy.deepcopy(model), CONFIG)
    calibrate(model, [x])
    return model.train()


class UnfusedLSQ(nn.Module):
    """LSQ in ordinary autograd operations, what a few lines of PyTorch would be."""

    def __init__(self, layer: Any, ours: Any):
        super().__init__()
        self.layer: Any = copy.deepcopy(layer)
        self.weight_scale = nn.Parameter(ours[0].weight_quantizer.scale.detach().clone())
        self.input_scale = nn.Parameter(ours[0].activation_quantizer.scale.detach().clone())

    @staticmethod
    def quantize(x: Tensor, scale: Tensor) -> Tensor:
        v = (x / scale).clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        return (v + (v.round() - v).detach()) * scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantize(self.layer.weight, self.weight_scale)
        return torch.func.functional_call(self.layer, {"weight": weight}, self.quantize(x, self.input_scale))


def torchao_layer(layer: nn.Module) -> nn.Module | None:
    """Of the same bits, but in the granularity that torchao has: inputs per token, weights per channel, none learned.

    It has linear layers alone.
    """
    if not isinstance(layer, nn.Linear):
        return None
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{BITS}"), "per_channel", is_symmetric=True)
    inputs = IntxFakeQuantizeConfig(getattr(torch, f"int{BITS}"), "per_token", is_symmetric=False)
    return FakeQuantizedLinear.from_linear(copy.deepcopy(layer), inputs, weights)


def brevitas_layer(layer: nn.Module) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    how = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": BITS,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": BITS,
        "bias": layer.bias is not None,
    }
    if isinstance(layer, nn.Linear):
        return qnn.QuantLinear(layer.in_features, layer.out_features, **how)
    return qnn.QuantConv2d(layer.in_channels, layer.out_channels, 3, padding=1, **how)


class Meter:
    """Interleaved medians on one clock."""

    def __init__(self, clock: str, repetitions: int, device: torch.device):
        self.now = time.process_time if clock == "process" else time.perf_counter
        self.repetitions, self.device = repetitions, device

    def medians(self, steps: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of one call of each."""
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # what happens once: allocation, compilation, first statistics
            step()
            step()
        for _ in range(self.repetitions):
            for name, step in steps.items():
                self.wait()
                start = self.now()
                step()
                self.wait()
                seconds[name].append(self.now() - start)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def with_backend(name: Backend, step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        before = set_backend(name)
        step()
        set_backend(before)

    return run


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        output = model(x)
        loss = nn.functional.cross_entropy(output if isinstance(output, Tensor) else output.logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_backward(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        x.grad = None
        model.zero_grad()
        output = model(x)
        (output if isinstance(output, Tensor) else output.value).backward(grad)

    return step


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
        seconds = meter.medians(steps)
        faults = {key: statistics.median(page_faults(way) for _ in range(3)) for key, way in steps.items()}
        ratios = {key: seconds[key] / seconds["float"] for key in ("eager", "compiled")}
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


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default="benchmarks/results/fake_quant.json")
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
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "clock": args.clock,
            "threads": torch.get_num_threads(),
            "load_average_before_and_after": [load_before, os.getloadavg()],
            "batch": args.batch,
            "repetitions": args.repetitions,
            "bits": BITS,
            "allocator": allocator_settings(),
            "versions": {name: version(name) for name in ("torch", "transformers", "timm", "torchao", "brevitas")},
        },
        "layers": layers,
        "training_step": times,
        "kept_for_backward": memory,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measure how long the layers of an export take with which bits, on the machine that this runs on."""

from __future__ import annotations

import copy
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...conversion import calibrate, check_has_values, is_packed, refuse_uncalibrated
from ...export import check_can_export, export_onnx
from ...export.layout import MODEL_FILE
from ...export.onnx_export import TUNED_FOR
from ...export.stored_grids import CODE_RANGE
from ...layers import QuantizedLayer
from ...progress import progress_bar
from ...quantizers import Quantizer, check_bits
from ...timing.machine import cores, machine, versions
from ...timing.nodes import layer_times, owners_of_nodes, time_nodes
from ..batch_losses import left_as_it_was
from .candidates import QuantizedOperand, quantized_operands
from .changing import change_bits
from .export_forms import LayerForm, Pair, forms_of, pairs_of
from .latency_table import LatencyTable, LayerLatency
from .layer_sensitivity import CANDIDATES
from .noise import medians_apart
from .shared_inputs import refuse_shared_quantizers

MEASURED_TARGETS = ("cpu", "cpu-vnni")
LEAST_NS = 500.0
"""What a layer takes at least: half of the microsecond that the profiler counts in."""
NUDGE = 2.0**-14
"""What ranges of activations are made to differ by, relative to their size: enough to be told apart in float32."""
Plan = list[dict[str, tuple[Pair, LayerForm]]]
"""For each export the bits of every layer, and the form that it has with them."""


def measure_latencies(
    model: nn.Module,
    inputs: Any,
    *,
    candidates: Sequence[int] = CANDIDATES,
    engine: str = "onnxruntime",
    target: str = "cpu",
    weights: str = "int8",
    tuned_for: str | None = None,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 10,
    progress: bool = True,
) -> LatencyTable:
    """Measure what each quantized layer takes in an export of `model`, with all bits that it has or may get.

    The model is exported into a temporary directory and run with the engine's own profiler. A node counts for the
    layer whose stored codes, values or scale it works on; what the engine fuses with a layer, such as an activation
    function or the quantization of what follows, counts for that layer, and a node that several layers share counts
    for each in equal parts. What is left, such as normalizations and sums, is told apart as `other_ns`. Each layer
    quantizes its own input here, as after training: layers that were only calibrated may share that.

    Integer kernels take codes of 2 to 8 bits alike. Bits that give the same operators and stored types share one
    measurement, so that noise makes no difference between them. These differ: weights and inputs of 8 bits, whose
    products `target="cpu"` splits into two halves; inputs of 8 bits, whose codes need no clipping; weights of up to 4
    bits with `weights="int4"`; and, for quantizers on half steps, weights of 8 bits, whose offset becomes a term of
    its own. There are as many exports as a layer has forms. They take turns, and medians over all turns count. Two
    forms share one as well, unless the sign of their difference is the same in nine of ten rounds.

    Args:
        model: A quantized, calibrated model, not packed; it is left as it was.
        inputs: A batch of model inputs: a float tensor `(batch, ...)`, or a dict or a pair that holds it. Activations
            with other bits are calibrated on it.
        candidates: Bits to choose from, each 2 to 8: those that [`allocate_bits`] will be given.
        engine: `"onnxruntime"` or `"openvino"`.
        target: `"cpu"` or `"cpu-vnni"`, as `export_onnx` takes it.
        weights: `"int8"` or `"int4"`, as `export_onnx` takes it, and `tuned_for` too.
        batch_size: Examples of a call; times are those of one example.
        threads: Threads of the engine.
        rounds: Turns that are measured, after one to warm up.
        progress: Whether to show a bar after a few seconds.

    Returns:
        What `allocate_bits(unit="ns", latencies=...)` takes, in nanoseconds. The sum over layers is that of their
        nodes: a call takes longer, by `other_ns` and by what the engine does between nodes.

    Raises:
        ValueError: If an argument is wrong, or the model is not quantized, or packed.
        ImportError: If a library is missing; says which extra installs it.
        RuntimeError: If the model is not calibrated, or the profile of the engine is not complete.
    """
    _check(engine, target, weights, tuned_for, candidates, batch_size, threads, rounds)
    operands = _operands(model)
    images = _images(model, inputs)
    pairs = {name: pairs_of(of_layer, candidates) for name, of_layer in operands.items()}
    forms = {name: forms_of(model.get_submodule(name), name, pairs[name], weights, target) for name in operands}
    plan = _plan(forms)
    bar = progress_bar(len(plan) + rounds + 1, "measuring exports", progress)
    with bar, left_as_it_was(model), tempfile.TemporaryDirectory(prefix="hf_saq_latencies_") as directory:
        contents, split = {}, {}
        how: dict[str, Any] = {"weights": weights, "target": target, "tuned_for": tuned_for}
        for number, of_layers in enumerate(plan):
            name = str(number)
            contents[name], split[name] = _exported(model, of_layers, images, Path(directory) / name, **how)
            bar.update()
        batch = images[torch.arange(batch_size) % len(images)].numpy()
        times = time_nodes(
            contents, batch, Path(directory), engine=engine, threads=threads, rounds=rounds, tell=bar.update
        )
    measured: dict[str, dict[LayerForm, list[list[float]]]] = {name: {} for name in operands}
    actual: dict[tuple[str, LayerForm], LayerForm] = {}
    others, shares = [], []
    for (name, content), of_layers in zip(contents.items(), plan, strict=True):
        owners = owners_of_nodes(content, times[name].nodes, *_constants(model, operands))
        for layer, (_, form) in of_layers.items():
            actual[layer, form] = form._replace(halves=layer in split[name])
        for number, turn in enumerate(times[name].turns):
            by_layer, other = layer_times(turn, owners)
            others.append(other / batch_size)
            shares.append(sum(by_layer.values()) / (sum(by_layer.values()) + other))
            for layer, (_, form) in of_layers.items():
                ns = max(by_layer.get(layer, 0.0), LEAST_NS) / batch_size
                in_rounds = measured[layer].setdefault(actual[layer, form], [[] for _ in range(rounds)])
                in_rounds[number].append(ns)
    medians = {
        name: medians_apart({form: list(map(statistics.median, in_rounds)) for form, in_rounds in of_layer.items()})
        for name, of_layer in measured.items()
    }
    entries = [
        LayerLatency(name, *pair, str(form := actual[name, forms[name][pair]]), medians[name][form])
        for name in operands
        for pair in pairs[name]
    ]
    return LatencyTable(
        engine=engine,
        target=target,
        weights=weights,
        tuned_for=tuned_for,
        batch_size=batch_size,
        threads=threads,
        rounds=rounds,
        entries=tuple(entries),
        other_ns=statistics.median(others),
        attributed=statistics.median(shares),
        exports=len(plan),
        machine=machine(),
        versions=versions(),
    )


def _check(
    engine: str,
    target: str,
    weights: str,
    tuned_for: str | None,
    candidates: Sequence[int],
    batch_size: int,
    threads: int,
    rounds: int,
) -> None:
    where = "measure_latencies"
    check_can_export(engine)
    for name, value, known in (
        ("target", target, MEASURED_TARGETS),
        ("weights", weights, tuple(CODE_RANGE)),
        ("tuned_for", tuned_for, TUNED_FOR),
    ):
        if value not in known:
            raise ValueError(f"{where}: {name}={value!r}; expected one of {list(known)}.")
    if not candidates:
        raise ValueError(f"{where}: `candidates` is empty; expected numbers of bits, such as (2, 4, 8).")
    for bits in candidates:
        check_bits(f"{where}: candidates", bits)
    for name, number in (("batch_size", batch_size), ("threads", threads), ("rounds", rounds)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{where}: {name}={number!r}; expected a positive integer.")
    if threads > cores():
        raise ValueError(f"{where}: threads={threads}; this process may use {cores()} cores. Ask for at most as many.")


def _operands(model: nn.Module) -> dict[str, dict[str, QuantizedOperand]]:
    found: dict[str, dict[str, QuantizedOperand]] = {}
    for operand in quantized_operands(model):
        found.setdefault(operand.name, {})[operand.operand] = operand
    if not found or is_packed(model):
        raise ValueError(
            f"measure_latencies: {type(model).__name__} has no quantizer of weights; expected a model made by "
            "`quantize`, not packed (see `unpack`)."
        )
    refuse_shared_quantizers(model, "measure_latencies")
    check_has_values(model)
    refuse_uncalibrated(model, "measure_latencies")
    return found


def _images(model: nn.Module, inputs: Any) -> Tensor:
    """Take the tensor out of a batch."""
    if isinstance(inputs, Mapping):
        inputs = inputs.get(getattr(model, "main_input_name", "pixel_values"))
    elif isinstance(inputs, (tuple, list)) and inputs:
        inputs = inputs[0]
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not len(inputs) or not inputs.is_floating_point():
        found = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"measure_latencies: `inputs` holds {found}; expected a float tensor (batch, ...) of model inputs, or a "
            "dict or a pair that holds it."
        )
    return inputs.detach().float().cpu()


def _plan(forms: Mapping[str, Mapping[Pair, LayerForm]]) -> Plan:
    """Choose bits for as few exports as show every form of every layer: by the first pair that has it."""
    shown: dict[str, list[tuple[Pair, LayerForm]]] = {}
    for name, of_layer in forms.items():
        first: dict[LayerForm, Pair] = {}
        for pair, form in of_layer.items():
            first.setdefault(form, pair)
        shown[name] = [(first[form], form) for form in sorted(first)]
    exports = range(max(map(len, shown.values())))
    return [{name: of_layer[min(k, len(of_layer) - 1)] for name, of_layer in shown.items()} for k in exports]


def _exported(
    model: nn.Module, plan: Mapping[str, tuple[Pair, LayerForm]], images: Tensor, directory: Path, **fields: Any
) -> tuple[bytes, set[str]]:
    """Export a copy of `model` with these bits; returns the graph, and the names of the layers that it splits."""
    copied = nn.Module.to(copy.deepcopy(model), device="cpu", dtype=torch.float32).eval()
    change_bits(copied, {name: _fields(pair) for name, (pair, _) in plan.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a graph that nobody gets would be warned of
        calibrate(copied, [images])
        _tell_apart(copied)
        report = export_onnx(copied, directory, example=images[:2], check=False, **fields)
    return (directory / MODEL_FILE).read_bytes(), {layer.name for layer in report.layers if layer.notes}


@torch.no_grad()
def _tell_apart(model: nn.Module) -> None:
    """Give every quantizer of activations a range of its own, as training will.

    Layers that read the same tensor are calibrated to the same range. An export has one quantization for them then,
    and one constant for equal ranges anywhere, under the name of one layer.
    """
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer) and m.role == "activation"]
    for number, quantizer in enumerate(quantizers):
        for parameter in quantizer.parameters():
            parameter.mul_(1 + number * NUDGE)


def _fields(pair: Pair) -> dict[str, int]:
    names = ("weight_bits", "activation_bits")
    return {field: bits for field, bits in zip(names, pair, strict=True) if bits is not None}


def _constants(
    model: nn.Module, operands: Mapping[str, Mapping[str, QuantizedOperand]]
) -> tuple[dict[str, bool], dict[str, list[str]]]:
    """List the layers with quantized weights, and whether inputs have an offset; of the others the names of scales."""
    layers: dict[str, bool] = {}
    scales: dict[str, list[str]] = {}
    for name, of_layer in operands.items():
        module = model.get_submodule(name)
        if "weight" in of_layer:
            inputs = of_layer["activation"].quantizers if "activation" in of_layer else ()
            layers[name] = any(quantizer.has_offset for quantizer in inputs)
        elif isinstance(module, QuantizedLayer):
            scales[name] = [f"{name}.activation.scale"]
        else:
            scales[name] = [
                f"{name}.{k}.scale" for k, child in module.named_children() if isinstance(child, Quantizer)
            ]
    return layers, scales

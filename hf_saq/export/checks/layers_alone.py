"""Run each layer of a shipped graph alone, on the input that it has in the model, and compare what it puts out.

A whole quantized model is no measure for its layers: one rounding that flips is carried on and grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extras import needed
from ..operators import OPSET
from ..passes.nodes import constant
from .sessions import run_graph
from .spans import LayerSpan, nodes_between, whole_codes

ROUNDING = 1e-5
"""What sums in float32 may differ by, as a share of the largest magnitude."""


FLIPPED = 0.02
"""Share of outputs that may be quantized to a neighbouring code: an engine may be off by a hundredth of a step, and by
what rounding the bias of a convolution to the product of its two scales makes."""
AT_EDGES = 1e-3
"""Share of outputs that may differ by more than a step, by what one input at an edge between two codes can change;
those that a single input feeds may in any case."""
FEW = 4
"""How many may in any case, in layers of few outputs."""


@dataclass(frozen=True)
class Recorded:
    """Holds input and output of one call of a layer, float32, and how it pads: see `_Part`."""

    x: np.ndarray
    y: np.ndarray
    own_pads: list[int] | None


@torch.no_grad()
def record(model: nn.Module, norms: dict[str, nn.Module | None], example: Tensor) -> dict[str, Recorded]:
    """Run `model` on `example` and record the first call of each layer.

    Args:
        norms: Name of a layer -> the normalization that the graph has folded into it, and that its output is put
            through here; `None` for none.
    """
    found: dict[str, Recorded] = {}

    def keep(name: str, norm: Any):
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name not in found:
                # Copied, since models add in place.
                y = output if norm is None else normalized(output, norm)
                x, y = (tensor.detach().float().cpu().numpy().copy() for tensor in (args[0], y))
                found[name] = Recorded(x, y, _own_pads(layer))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name, norm)) for name, norm in norms.items()]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in norms if name in found}


def normalized(y: Tensor, norm: Any) -> Tensor:
    """Compute what a batch normalization does in evaluation, whatever else its module does behind it."""
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)


def _own_pads(layer: Any) -> list[int] | None:
    padding = getattr(layer, "padding", None)
    plain = isinstance(padding, tuple) and getattr(layer, "padding_mode", "zeros") == "zeros"
    return [*padding, *padding] if plain else None  # type: ignore[misc]


def wrong_layers(
    graph_model: Any, spans: dict[str, LayerSpan], recorded: dict[str, Recorded], engine: str
) -> dict[str, str]:
    """Say for each layer that computes something else than recorded what was found.

    Where a quantization follows, a few outputs may differ by one of its steps. Where none does, all may by what one
    step of the layer's own input can change.

    Args:
        engine: A key of `RUNS`.
    """
    parts = [_Part(i, name, spans[name], recorded[name]) for i, name in enumerate(recorded)]
    if not parts:
        return {}
    found = run_graph(engine, _side_by_side(graph_model, parts), {part.input_name: part.x for part in parts})
    reasons = {part.name: part.difference(found[part.output_name]) for part in parts}
    return {name: reason for name, reason in reasons.items() if reason}


class _Part:
    """Cuts one layer out of the graph, with the quantization that follows it."""

    def __init__(self, index: int, name: str, span: LayerSpan, recorded: Recorded):
        self.index, self.name, self.span = index, name, span
        self.x = self._without_pads(recorded.x, recorded.own_pads)
        self.following = self._following()
        self.last = span.output if self.following is None else self.following[-1].outputs[0]
        self.y = recorded.y if self.following is None else self._quantized(recorded.y)
        self.input_name, self.output_name = self.renamed(span.input), self.renamed(self.last)

    def renamed(self, value: Any) -> str:
        return f"{self.index}/{value.name}"

    def nodes(self) -> list[Any]:
        return nodes_between(self.span.input, self.last)

    def _following(self) -> list[Any] | None:
        """Return the nodes that quantize the output and dequantize it again."""
        for user, _ in self.span.output.uses():
            chain = [user] if user.op_type == "QuantizeLinear" else []
            while chain and chain[-1].op_type != "DequantizeLinear":
                users = [node for node, _ in chain[-1].outputs[0].uses()]
                chain = [*chain, users[0]] if users and users[0].op_type in ("Clip", "DequantizeLinear") else []
            if chain:
                return chain
        return None

    def _quantized(self, y: np.ndarray) -> np.ndarray:
        quantize, *others = self.following or []
        scale, zero_point = (constant(value) for value in quantize.inputs[1:])
        low, high = 0, 255
        if len(others) == 2:
            low, high = (int(constant(value)) for value in others[0].inputs[1:])  # type: ignore[arg-type]
        return (np.clip(np.rint(y / scale) + int(zero_point), low, high) - int(zero_point)) * scale  # type: ignore[arg-type]

    def _without_pads(self, x: np.ndarray, own_pads: list[int] | None) -> np.ndarray:
        """Cut off the zeros that the model padded before the layer, where the convolution in the graph pads them.

        Args:
            own_pads: What the layer pads itself, as ONNX lists it; `None` if that is not known beforehand.
        """
        if own_pads is None or self.span.pads is None:
            return x
        pads = np.array(self.span.pads) - np.array(own_pads)
        kept = [slice(before, size - after) for before, after, size in zip(*_halves(pads), x.shape[2:], strict=True)]
        index = (slice(None), slice(None), *kept)
        return np.ascontiguousarray(x[index])

    def difference(self, found: np.ndarray) -> str:
        if found.shape != self.y.shape:
            return f"its output has shape {found.shape}; expected {self.y.shape}"
        rounding = ROUNDING * max(np.abs(self.y).max(), 1e-30)
        allowed = of_input = self._change_by_one_input()
        if self.following is not None:
            allowed = float(constant(self.following[0].inputs[1]))  # type: ignore[arg-type]
        errors = np.abs(found - self.y)
        worst = float(errors.max())
        # Inputs next to an edge may be rounded to the other side, which counts for more where weights are large.
        beyond = int((errors > allowed * 1.001 + rounding).sum())
        few = max(FEW, AT_EDGES * found.size, self._fed_by_one_input()) if self.following is not None else 0
        if not worst <= (allowed + of_input if few else allowed) * 1.001 + rounding or beyond > few:  # NaN is not
            return f"its output differs by up to {worst:.3g}; one step is {allowed:.3g}"
        flipped = int((errors > rounding).sum())
        share = FLIPPED + self._rounded_bias(allowed)
        if self.following is not None and flipped > max(share * found.size, FEW):
            return f"{flipped} of {found.size} outputs are quantized to another code; expected at most {share:.1%}"
        return ""

    def _change_by_one_input(self) -> float:
        """Return what the output changes by, at most, if one input is quantized to the next code."""
        if self.span.quantize is None:
            return 0.0
        weight = np.abs(whole_codes(self.span).astype(np.float64)).max()
        step = float(constant(self.span.quantize.inputs[1]))  # type: ignore[arg-type]
        return step * weight * float(np.max(constant(self.span.weight.inputs[1])))  # type: ignore[arg-type]

    def _fed_by_one_input(self) -> int:
        """Return how many outputs one input goes into."""
        codes = whole_codes(self.span)
        groups = self.span.product.attributes.get_int("group", 1)
        return codes.size // codes.shape[1 - self.span.channel_axis] // groups

    def _rounded_bias(self, step: float) -> float:
        """Return the share of outputs that cross an edge when a bias is rounded: half a unit of it, in steps."""
        if self.following is None or self.span.quantize is None or self.span.product.op_type != "Conv":
            return 0.0
        unit = constant(self.span.quantize.inputs[1]) * constant(self.span.weight.inputs[1])  # type: ignore[operator]
        return float(np.mean(unit)) / 2 / step


def _halves(pads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pads[: len(pads) // 2], pads[len(pads) // 2 :]


def _side_by_side(graph_model: Any, parts: list[_Part]) -> bytes:
    """Write one graph in which each part has an input and an output of its own."""
    ir: Any = needed("onnx_ir")
    constants: dict[str, Any] = {}
    nodes, inputs, outputs = [], [], []
    for part in parts:
        float_type = ir.TensorType(ir.DataType.FLOAT)
        first = ir.Value(name=part.input_name, type=float_type, shape=ir.Shape([None] * part.x.ndim))
        values: dict[Any, Any] = {part.span.input: first}
        for node in part.nodes():
            for value in node.inputs:
                if value is not None and value not in values:
                    values[value] = constants.setdefault(value.name, _copy_of(ir, value))
            made = [ir.Value(name=part.renamed(value)) for value in node.outputs]
            values.update(zip(node.outputs, made, strict=True))
            taken = [None if value is None else values[value] for value in node.inputs]
            nodes.append(ir.Node("", node.op_type, taken, list(node.attributes.values()), outputs=made))
        last = values[part.last]
        last.type, last.shape = float_type, ir.Shape([None] * part.y.ndim)
        inputs.append(first)
        outputs.append(last)
    opsets = {"": OPSET}
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(constants.values()), opset_imports=opsets)
    return ir.to_proto(ir.Model(graph, ir_version=graph_model.ir_version)).SerializeToString()


def _copy_of(ir: Any, value: Any) -> Any:
    assert value.const_value is not None, f"{value.name} is no constant"
    tensor = value.const_value
    return ir.Value(name=value.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

"""Tell which quantized layers the nodes of a graph belong to, in the graph that an engine made of an export.

The engine folds constants, fuses nodes and renames some; most values keep the names that they have in the export. A
node belongs, by the first of these that says anything, to the layers

1. whose product it computes, or whose stored weight it reads, whatever was made of its codes;
2. whose values it computes;
3. which another node began, whose result it reads: such as the product that a bias is added to;
4. whose scale it quantizes with;
5. to whose nodes it only moves or clips what comes from a node of this or another layer.

What prepares an input belongs to all the layers that read it, also where the engine has merged what the export does
for each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...export.checks.spans import find_span, nodes_between
from ...export.extras import needed
from ...export.passes.nodes import constant
from .profilers import RunningNode

MOVING = (
    "Clip",
    "Transpose",
    "Reshape",
    "Concat",
    "Gather",
    "Slice",
    "Pad",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "Reorder",
)
PREPARING = (*MOVING, "QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Clamp")
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
Owners = dict[str, tuple[str, ...]]
"""Name of a node or of a value -> the layers that it belongs to, which share it evenly."""


@dataclass
class _Values:
    """Collects names of values -> the layers that they belong to, for each of the first four rules."""

    products: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    computed: dict[str, list[str]] = field(default_factory=dict)
    inner: dict[str, list[str]] = field(default_factory=dict)
    last: dict[str, list[str]] = field(default_factory=dict)
    scales: dict[str, list[str]] = field(default_factory=dict)

    def add(self, layer: str, nodes: list[Any]) -> None:
        """Add what is computed inside `layer` by these nodes of an export."""
        outputs = [value for node in nodes for value in node.outputs]
        consumed = {id(value) for node in nodes for value in node.inputs}
        fixed: set[int] = set()
        for node in nodes:
            inputs = [value for value in node.inputs if value is not None]
            is_fixed = all(value.const_value is not None or id(value) in fixed for value in inputs)
            if is_fixed:
                fixed.update(id(value) for value in node.outputs)
            large = [v for v in inputs if v.const_value is not None and len(v.const_value.shape) > 1]
            for value in (*large, *(node.outputs if is_fixed else ())):
                _note(self.weights, value, layer)
            if node.op_type in PRODUCTS and not is_fixed:
                _note(self.products, node.outputs[0], layer)
            if node.op_type == "QuantizeLinear":
                _note(self.scales, node.inputs[1], layer)
        for value in outputs:
            if id(value) not in fixed:
                _note(self.computed, value, layer)
                _note(self.inner if id(value) in consumed else self.last, value, layer)


def _note(found: dict[str, list[str]], value: Any, layer: str) -> None:
    layers = found.setdefault(value.name, [])
    if layer not in layers:
        layers.append(layer)


def owners_of_nodes(
    export: bytes,
    running: Sequence[RunningNode],
    layers: Mapping[str, bool],
    scales: Mapping[str, Collection[str]],
) -> Owners:
    """Find the layers of each node that runs.

    Args:
        export: The graph of an export.
        running: What an engine runs for it, in its order.
        layers: Name of each layer with a quantized weight -> whether the grid of its input has an offset.
        scales: Name of any other quantized layer -> names of the scales of its inputs in the graph.

    Returns:
        Name of a node -> names of its layers; nodes that belong to none are missing.
    """
    graph_model = needed("onnx_ir").from_proto(needed("onnx").load_from_string(export))
    values = _Values()
    for name, affine in layers.items():
        span = find_span(graph_model, name, affine)
        if span is not None:
            values.add(name, nodes_between(span.input, span.output))
    for name, of_layer in scales.items():
        values.add(name, _fed_by(graph_model, of_layer))
    begun: dict[str, tuple[str, ...]] = {}  # name of a value inside a layer, whose work is not done there -> layers
    found: Owners = {}
    for node in running:
        if owners := _by_values(node, values, begun):
            found[node.name] = owners
        done = {layer for name in node.outputs for layer in values.last.get(name, ())}
        inside = dict.fromkeys(layer for name in node.outputs for layer in values.inner.get(name, ()))
        begun.update(dict.fromkeys(node.outputs, tuple(layer for layer in inside if layer not in done)))
    return found | _prepared(running, found)


def _fed_by(graph_model: Any, scales: Collection[str]) -> list[Any]:
    """List the nodes from the quantizations with these scales to the products that they go into."""
    starts = [n for n in graph_model.graph if n.op_type == "QuantizeLinear" and n.inputs[1].name in scales]
    found, waiting = {id(node) for node in starts}, list(starts)
    while waiting:
        node = waiting.pop()
        for user, _ in node.outputs[0].uses() if node.op_type not in PRODUCTS else ():
            shifts = user.op_type == "Add" and any(constant(value) is not None for value in user.inputs)
            goes_on = user.op_type in (*MOVING, *PRODUCTS, "DequantizeLinear") or shifts
            if goes_on and id(user) not in found:
                found.add(id(user))
                waiting.append(user)
    return [node for node in graph_model.graph if id(node) in found]


def _by_values(node: RunningNode, values: _Values, begun: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    scale = node.inputs[1:2] if node.op_type == "QuantizeLinear" else ()
    rules: tuple[tuple[tuple[str, ...], Mapping[str, Collection[str]]], ...] = (
        (node.outputs, values.products),
        (node.inputs, values.weights),
        (node.outputs, values.computed),
        (node.inputs, begun),
        (scale, values.scales),
    )
    for names, known in rules:
        if owners := dict.fromkeys(layer for name in names for layer in known.get(name, ())):
            return tuple(owners)
    return ()


def _prepared(nodes: Sequence[RunningNode], owners: Owners) -> Owners:
    """Find the layers that what only prepares an input goes to, if it comes from a node of a layer or is one."""
    from_layer: set[str] = set()  # names of values
    for node in nodes:
        if node.name in owners or (node.op_type in MOVING and from_layer.intersection(node.inputs[:1])):
            from_layer.update(node.outputs)
    goes_to: dict[str, dict[str, None]] = {}  # name of a value -> layers
    found: Owners = {}
    for node in reversed(nodes):
        layers = dict.fromkeys(owners.get(node.name, ()))
        if node.op_type in PREPARING and from_layer.intersection(node.outputs):
            readers = {layer: None for name in node.outputs for layer in goes_to.get(name, ())}
            if readers:
                layers = readers
                found[node.name] = tuple(readers)
        for name in node.inputs:
            goes_to.setdefault(name, {}).update(layers)
    return found


def layer_times(nodes: Mapping[str, float], owners: Owners) -> tuple[dict[str, float], float]:
    """Add up times of nodes by the layers that they belong to; returns that, and the time of all other nodes."""
    times: dict[str, float] = {}
    other = 0.0
    for name, time in nodes.items():
        for layer in owners.get(name, ()):
            times[layer] = times.get(layer, 0.0) + time / len(owners[name])
        if name not in owners:
            other += time
    return times, other

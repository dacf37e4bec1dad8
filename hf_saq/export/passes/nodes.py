"""Read and rewire the nodes of an `onnx_ir` graph: what all passes need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np


def nodes_of(model: Any, *op_types: str) -> Iterator[Any]:
    """Go through the nodes of these types, while they may be replaced."""
    for node in list(model.graph):
        if node.op_type in op_types and node.graph is not None:
            yield node


def producer(value: Any, *op_types: str) -> Any:
    """Return the node that computes `value` if it is of one of these types, otherwise `None`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def constant(value: Any) -> np.ndarray | None:
    """Return the constant that `value` is, or `None`."""
    if value is None:
        return None
    found = value.const_value
    if found is None and (node := producer(value, "Constant")) is not None and "value" in node.attributes:
        found = node.attributes["value"].as_tensor()
    return None if found is None else found.numpy()


def only_used_by(value: Any, *op_types: str) -> bool:
    """Tell whether `value` is used, by nodes of these types alone, and is no output of the graph."""
    users = [node for node, _ in value.uses()]
    return bool(users) and not value.is_graph_output() and all(node.op_type in op_types for node in users)


def used_once(value: Any) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def add_initializer(graph: Any, name: str, array: np.ndarray, dtype: Any = None) -> Any:
    """Add a constant to `graph`; where the name is taken, a constant that nothing uses gives it up."""
    ir = import_module("onnx_ir")
    taken = graph.initializers.get(name)
    if taken is not None and not taken.uses():
        del graph.initializers[name]
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(np.array(array, order="C"), dtype=dtype, name=name)  # `ascontiguousarray` makes scalars vectors
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_constant(node: Any, index: int, array: np.ndarray, suffix: str, dtype: Any = None) -> None:
    """Give `node` another constant as an input, under the old one's name if nobody else uses that."""
    old = node.inputs[index]
    node.replace_input_with(index, None)
    name = old.name if old is not None and not old.uses() else f"{node.outputs[0].name}{suffix}"
    node.replace_input_with(index, add_initializer(node.graph, name, array, dtype))


def set_integer(node: Any, name: str, value: int) -> None:
    node.attributes.add(import_module("onnx_ir").AttrInt64(name, value))


def insert_node(before: Any, op_type: str, inputs: list[Any], attributes: dict[str, Any] | None = None) -> Any:
    """Put a new node of one output before the node `before`; return the output."""
    ir = import_module("onnx_ir")
    node = ir.node(op_type, inputs, attributes=attributes or {})
    before.graph.insert_before(before, node)
    return node.outputs[0]


def replace_value(old: Any, new: Any) -> None:
    """Let `new` stand wherever `old` does, under the name of `old`, and remove what computed `old`."""
    node, name = old.producer(), old.name
    import_module("onnx_ir").convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.shape, new.type = old.shape, old.type
    node.graph.remove(node, safe=True)
    old.name = None
    new.name = name


def add_bias(before: Any, value: Any, bias: Any) -> Any:
    """Put the sum of `value` and a constant before the node `before`, as a difference; return it.

    ONNX Runtime makes a `MatMul` with an `Add` a `Gemm` again, and fuses an `Add` with what follows it.
    """
    array = constant(bias)
    assert array is not None, f"{bias.name} is no constant"
    return insert_node(before, "Sub", [value, add_initializer(before.graph, f"{bias.name}.negative", -array)])


def insert_behind(node: Any, op_type: str, other: Any) -> None:
    """Let an operator of two inputs, the output of `node` and `other`, take the place of that output."""
    ir = import_module("onnx_ir")
    value, name = node.outputs[0], node.outputs[0].name
    new = ir.node(op_type, [None, other])
    node.graph.insert_after(node, new)
    result = new.outputs[0]
    ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
    new.replace_input_with(0, value)
    result.shape, result.type = value.shape, value.type
    value.name = f"{name}.before"
    result.name = name

"""Bring linear layers into the one form that engines run in integers: a product with stored codes, then a bias.

Layers whose input stays in float are brought into another one. ONNX Runtime would take that form for `MatMulNBits`,
and quantize the input of that to 8 bits, which nobody asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from .nodes import (
    add_bias,
    add_initializer,
    constant,
    insert_node,
    nodes_of,
    only_used_by,
    producer,
    replace_value,
    set_constant,
    set_integer,
    used_once,
)


def transpose_stored_weights(model: Any) -> int:
    """Store codes transposed where the graph transposes what they dequantize to; changes no result.

    Returns:
        How many weights were changed.
    """
    count = 0
    for node in nodes_of(model, "Transpose"):
        weight = _stored_matrix(node.inputs[0])
        if weight is None or not all(_is_dequantized(user.inputs[0]) for user, _ in node.outputs[0].uses()):
            continue
        if used_once(node.inputs[0]) and list(node.attributes["perm"].as_ints()) == [1, 0]:
            _transpose(weight)
            replace_value(node.outputs[0], node.inputs[0])
            count += 1
    return count


def gemms_to_matmuls(model: Any) -> int:
    """Write `Gemm` with stored codes as a `MatMul` less the negative bias; changes no result but the order of a sum.

    ONNX Runtime runs that in integers without a following quantization. `Gemm` it does not, and a `MatMul` of matrices
    with an `Add` it makes a `Gemm` again.

    Returns:
        How many nodes were changed.
    """
    count = 0
    for node in nodes_of(model, "Gemm"):
        weight = _stored_matrix(node.inputs[1])
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if weight is None or not used_once(node.inputs[1]) or factors != [1, 1]:
            continue
        if not _is_dequantized(node.inputs[0]) or node.attributes.get_int("transA", 0):
            continue
        if node.attributes.get_int("transB", 0):
            _transpose(weight)
        y = insert_node(node, "MatMul", list(node.inputs[:2]))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            is_constant = constant(node.inputs[2]) is not None
            y = add_bias(node, y, node.inputs[2]) if is_constant else insert_node(node, "Add", [y, node.inputs[2]])
        replace_value(node.outputs[0], y)
        count += 1
    return count


def subtract_biases_before_gelus(model: Any) -> int:
    """Write the sum of a product and a constant bias that only goes into a `Gelu` as a difference; changes no result.

    ONNX Runtime fuses the sum and the `Gelu` into one kernel, which takes longer than the two it replaces.

    Returns:
        How many sums were changed.
    """
    count = 0
    for node in nodes_of(model, "Add"):
        for value, bias in (node.inputs, reversed(node.inputs)) if only_used_by(node.outputs[0], "Gelu") else ():
            if constant(bias) is not None and producer(value, "MatMul") is not None:
                replace_value(node.outputs[0], add_bias(node, value, bias))
                count += 1
                break
    return count


def keep_inputs_in_float(model: Any) -> int:
    """Dequantize int8 codes that only products with inputs in float use by a cast and a product; changes no result.

    ONNX Runtime makes `DequantizeLinear` and `MatMul` a `MatMulNBits`, transposed or not. The cast it computes once.

    Returns:
        How many weights were changed.
    """
    float_type = import_module("onnx_ir").DataType.FLOAT
    count = 0
    for node in nodes_of(model, "DequantizeLinear"):
        codes, scale = constant(node.inputs[0]), constant(node.inputs[1])
        if codes is None or scale is None or codes.ndim != 2 or codes.dtype != np.int8 or len(node.inputs) > 2:
            continue
        transposed = only_used_by(node.outputs[0], "Transpose") and used_once(node.outputs[0])
        products = next(iter(node.outputs[0].uses()))[0].outputs[0] if transposed else node.outputs[0]
        users = [user for user, _ in products.uses()]
        if not only_used_by(products, "MatMul") or any(_is_dequantized(user.inputs[0]) for user in users):
            continue
        if scale.ndim:
            scale = np.expand_dims(scale, 1 - node.attributes.get_int("axis", 1) % 2)
        name = node.inputs[1].name
        cast = insert_node(node, "Cast", [node.inputs[0]], {"to": float_type.value})
        node.replace_input_with(1, None)
        replace_value(node.outputs[0], insert_node(node, "Mul", [cast, add_initializer(model.graph, name, scale)]))
        count += 1
    return count


def _is_dequantized(value: Any) -> bool:
    return producer(value, "DequantizeLinear") is not None


def _stored_matrix(value: Any) -> Any:
    """Return the node that dequantizes a constant matrix to `value`, or `None`."""
    node = producer(value, "DequantizeLinear")
    codes = None if node is None else constant(node.inputs[0])
    return node if codes is not None and codes.ndim == 2 else None


def _transpose(weight: Any) -> None:
    codes, scale = constant(weight.inputs[0]), constant(weight.inputs[1])
    assert codes is not None and scale is not None
    set_constant(weight, 0, codes.T, ".codes")
    if scale.ndim:
        set_integer(weight, "axis", 1 - weight.attributes.get_int("axis", 1) % 2)
    weight.outputs[0].shape = weight.inputs[0].shape

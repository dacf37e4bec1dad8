"""Keep integer products exact on CPUs that add two of them up in 16 bits.

`vpmaddubsw` of AVX2 multiplies uint8 codes of inputs with int8 codes of weights and adds neighbouring products into 16
bits, where the sum saturates: 255 * 127 * 2 does not fit. ONNX Runtime and OpenVINO use it on CPUs without VNNI, and
say nothing (onnxruntime#6004, pytorch#103646).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from .codes import PAIR_LIMIT, largest_code
from .nodes import add_initializer, constant, insert_node, nodes_of, producer, used_once


def may_saturate(codes: np.ndarray, channel_axis: int, high: int) -> bool:
    """Tell whether two products of an output channel can leave 16 bits, whichever two an engine adds up.

    Args:
        codes: int8 codes of a weight.
        channel_axis: Dimension of `codes` that counts output channels.
        high: Largest code of the input.
    """
    by_channel = np.moveaxis(codes, channel_axis, 0).reshape(codes.shape[channel_axis], -1).astype(np.int64)
    ordered = np.sort(by_channel, axis=1)
    largest, smallest = ordered[:, -2:].clip(min=0).sum(1), ordered[:, :2].clip(max=0).sum(1)
    return bool(high * largest.max(initial=0) > PAIR_LIMIT or high * smallest.min(initial=0) < -PAIR_LIMIT - 1)


def saturating_layers(model: Any) -> list[str]:
    """Name the layers whose products may saturate, by the names of their codes."""
    return [_name(weight) for product, weight in _products(model) if _is_unsafe(product, weight)]


def split_saturating_layers(model: Any) -> list[str]:
    """Split the weight of each such layer into two halves, `c = c / 2 + (c - c / 2)`; changes no result.

    The input goes in twice, so that the layer stays one product, twice as long, of codes that fit. The graph stores
    the codes once and computes the halves, which engines do when they load it. Convolutions of one channel for each
    group (depthwise) stay: engines sum those in 32 bits.

    Returns:
        Names of the layers that were split.
    """
    split = []
    for product, weight in _products(model):
        dequantize = producer(product.inputs[0], "DequantizeLinear")
        groups = product.attributes.get_int("group", 1)
        if dequantize is None or groups > 1 or not used_once(weight.outputs[0]) or not _is_unsafe(product, weight):
            continue
        is_matmul = product.op_type == "MatMul"
        split.append(_name(weight))
        weight.replace_input_with(0, _halves(weight, axis=0 if is_matmul else 1))
        # The input may go to other nodes too.
        twice = insert_node(product, "Concat", [dequantize.inputs[0]] * 2, {"axis": -1 if is_matmul else 1})
        x = insert_node(product, "DequantizeLinear", [twice, *dequantize.inputs[1:]])
        x.shape = None
        product.replace_input_with(0, x)
        if not dequantize.outputs[0].uses() and not dequantize.outputs[0].is_graph_output():
            dequantize.graph.remove(dequantize, safe=True)
    return split


def _halves(weight: Any, axis: int) -> Any:
    """Write the nodes that split the codes of `weight` and put the halves behind each other along `axis`."""
    types = import_module("onnx_ir").DataType
    two = add_initializer(weight.graph, f"{_name(weight)}.two", np.array(2, dtype=np.int32))
    codes = insert_node(weight, "Cast", [weight.inputs[0]], {"to": types.INT32})
    half = insert_node(weight, "Div", [codes, two])  # rounds as an engine likes: the other half is what remains
    halves = insert_node(weight, "Concat", [half, insert_node(weight, "Sub", [codes, half])], {"axis": axis})
    return insert_node(weight, "Cast", [halves], {"to": types.INT8})


def _products(model: Any) -> list[tuple[Any, Any]]:
    """List the products of dequantized inputs with stored int8 codes, each with the node of its weight."""
    found = []
    for product in nodes_of(model, "Conv", "MatMul"):
        weight = producer(product.inputs[1], "DequantizeLinear")
        codes = None if weight is None else constant(weight.inputs[0])
        if (
            codes is not None
            and codes.dtype == np.int8
            and producer(product.inputs[0], "DequantizeLinear") is not None
        ):
            found.append((product, weight))
    return found


def _is_unsafe(product: Any, weight: Any) -> bool:
    codes = constant(weight.inputs[0])
    assert codes is not None
    depthwise = product.op_type == "Conv" and codes.shape[1] == 1 and product.attributes.get_int("group", 1) > 1
    axis = 1 if product.op_type == "MatMul" else 0
    return not depthwise and may_saturate(codes, axis, largest_code(product.inputs[0]))


def _name(weight: Any) -> str:
    return weight.inputs[0].name.removesuffix(".codes")

"""Find in a shipped graph which nodes compute each layer, from the constants that carry its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.nodes import constant, producer


@dataclass(frozen=True)
class LayerSpan:
    """Holds where a layer is in a graph.

    Attributes:
        weight: The `DequantizeLinear` of its codes, or the `Mul` of their cast and its scale.
        product: Its `Conv`, `MatMul` or `Gemm`.
        channel_axis: Dimension of the stored codes that counts output channels.
        quantize: The `QuantizeLinear` of its input; `None` if that stays in float.
        clip: The `Clip` of its input's codes, or `None`.
        input: The value that is quantized, or that goes into the product.
        output: The value that the layer computes, bias and other terms included.
        pads: Zeros that it pads around its input, as ONNX lists them; `None` if it is no convolution.
        in_patches: Whether it is a convolution over patches, written as a product over channels, then places.
    """

    weight: Any
    product: Any
    channel_axis: int
    quantize: Any
    clip: Any
    input: Any
    output: Any
    pads: list[int] | None
    in_patches: bool = False


def find_span(model: Any, name: str, affine: bool) -> LayerSpan | None:
    """Find the layer called `name`; `None` if the graph has no stored codes of it, or does not use them.

    Args:
        affine: Whether the grid of its input has an offset, which is subtracted before it is quantized.
    """
    codes = model.graph.initializers.get(f"{name}.codes")
    weight = _dequantized(codes)
    transpose = None if weight is None else _user(weight.outputs[0], "Transpose")
    operand = None if weight is None else (weight if transpose is None else transpose).outputs[0]
    product = _user(operand, "Conv", "MatMul", "Gemm")
    if product is None:
        return None
    columns = product.op_type == "MatMul" or (
        product.op_type == "Gemm" and not product.attributes.get_int("transB", 0)
    )
    channel_axis = int(columns != (transpose is not None))
    x = product.inputs[0]
    while (node := producer(x, "Pad", "Concat", "Gather")) is not None and _on_codes(node):
        x = node.inputs[0]
    dequantize = producer(x, "DequantizeLinear")
    clip = quantize = None
    output, pads, in_patches = _end(product.outputs[0]), None, False
    if product.op_type == "Conv":
        pads = list(product.attributes.get_ints("pads", [0] * 2 * (len(product.attributes.get_ints("kernel_shape")))))
    if dequantize is not None:
        codes_of_x = dequantize.inputs[0]
        while (node := producer(codes_of_x, "Concat", "Gather", "Slice", "Pad", "Transpose", "Reshape")) is not None:
            codes_of_x = node.inputs[0]
            in_patches = in_patches or node.op_type == "Reshape"
            if node.op_type == "Pad":
                pads = [int(constant(node.inputs[1])[i]) for i in (1, 2, 5, 6)]  # type: ignore[index]
            elif node.op_type == "Transpose":  # a convolution, written as a product with its channels last
                pads = [0] * 4 if pads is None else pads
                output = _end(_user(output, "Transpose").outputs[0])
        clip = producer(codes_of_x, "Clip")
        quantize = producer(codes_of_x if clip is None else clip.inputs[0], "QuantizeLinear")
        x = quantize.inputs[0]
        if affine:
            shift = producer(x, "Sub")
            assert shift is not None, f"{name}: no offset is subtracted"
            x = shift.inputs[0]
    return LayerSpan(weight, product, channel_axis, quantize, clip, x, output, pads, in_patches)


def stored_codes(span: LayerSpan) -> np.ndarray:
    """Return the integers of the weight as the graph multiplies them: those it stores, or halves of them."""
    return computed(span.weight.inputs[0]).astype(np.int32)


def whole_codes(span: LayerSpan) -> np.ndarray:
    """Return the integers of the weight, with halves added up."""
    codes = stored_codes(span)
    if constant(span.weight.inputs[0]) is not None or span.weight.op_type == "Mul":
        return codes
    return np.add(*np.split(codes, 2, axis=0 if span.product.op_type == "MatMul" else 1))


def computed(value: Any) -> np.ndarray:
    """Evaluate what the graph makes of stored codes."""
    found = constant(value)
    if found is not None:
        return found
    node = value.producer()
    inputs = [computed(one) for one in node.inputs]
    if node.op_type == "Concat":
        return np.concatenate(inputs, axis=node.attributes.get_int("axis", 0))
    return _OPERATORS[node.op_type](*inputs)


_OPERATORS: dict[str, Any] = {
    "Cast": lambda x: x.astype(np.int32),
    "Div": lambda x, y: np.trunc(x / y).astype(np.int32),  # ONNX rounds quotients of integers towards zero
    "Sub": np.subtract,
}
"""What `split_saturating_layers` writes between codes and product."""


def nodes_between(start: Any, end: Any) -> list[Any]:
    """List the nodes that compute `end` from `start` and constants, in their order."""
    found: dict[int, Any] = {}
    waiting = [end]
    while waiting:
        node = None if (value := waiting.pop()) is start else value.producer()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            waiting += [value for value in node.inputs if value is not None]
    return [node for node in end.producer().graph if id(node) in found]


def _user(value: Any, *op_types: str) -> Any:
    users = [] if value is None else [node for node, _ in value.uses() if node.op_type in op_types]
    return users[0] if users else None


def _dequantized(codes: Any) -> Any:
    """Return the node that dequantizes stored codes, or their halves."""
    while codes is not None and (node := _user(codes, "DequantizeLinear", "Mul")) is None:
        node = _user(codes, "Cast", "Div", "Sub", "Concat")
        codes = None if node is None else node.outputs[0]
    return None if codes is None else node


def _on_codes(node: Any) -> bool:
    return producer(node.inputs[0], "DequantizeLinear", "Pad", "Concat", "Gather") is not None


def _end(value: Any) -> Any:
    """Follow the sums of terms that belong to the layer."""
    while len(value.uses()) == 1 and not value.is_graph_output():
        user = next(iter(value.uses()))[0]
        others = [one for one in user.inputs if one is not value]
        if user.op_type not in ("Add", "Sub") or len(others) != 1 or not _is_term(others[0]):
            break
        if user.op_type == "Sub" and (constant(others[0]) is None or _shifts_what_is_quantized(user, others[0])):
            break
        value = user.outputs[0]
    return value


def _shifts_what_is_quantized(node: Any, subtracted: Any) -> bool:
    """Tell whether `node` subtracts the offset of the grid that quantizes its result: the next layer's, not a bias."""
    return constant(subtracted).size == 1 and _user(node.outputs[0], "QuantizeLinear") is not None  # type: ignore[union-attr]


def _is_term(value: Any) -> bool:
    """Tell whether `value` is a bias, a sum of inputs times the offset of a weight, or what padding leaves out of one.

    These are the terms of `integer_layers`. A residual branch is none of them.
    """
    if constant(value) is not None:
        return True
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Conv":
        return all(constant(one) is not None for one in node.inputs)
    if node.op_type == "Mul" and any(constant(one) is not None for one in node.inputs):
        return any(producer(one, "MatMul", "Conv", "Reshape") is not None for one in node.inputs)
    return False

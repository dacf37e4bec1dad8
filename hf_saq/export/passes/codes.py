"""Choose how wide codes are stored: so wide that biases are exact, or as narrow as they are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from .nodes import add_initializer, constant, insert_behind, nodes_of, producer, set_constant, used_once

PAIR_LIMIT = 2**15 - 1
"""What two neighbouring products of uint8 and int8 may add up to on a CPU that sums them in 16 bits (AVX2 without
VNNI): beyond it they saturate, without a word."""


def largest_code(value: Any) -> int:
    """Return the largest uint8 code that `value` is dequantized from; 255 if it is unknown."""
    node = producer(value, "DequantizeLinear")
    clip = None if node is None else producer(node.inputs[0], "Clip")
    high = None if clip is None else constant(clip.inputs[2])
    return 255 if high is None else int(high)


def widen_codes(model: Any) -> int:
    """Multiply the codes of convolutions by a power of two, and divide their scales by it; changes no result.

    ONNX Runtime rounds the bias of an integer convolution to the product of the two scales. With codes of few bits
    that is a good part of a step of what follows, so that outputs would differ; with wide ones it is not. Codes become
    as wide as an int8 holds, and not so wide that products could saturate.

    Returns:
        How many weights were changed.
    """
    count = 0
    for node in nodes_of(model, "Conv"):
        weight = producer(node.inputs[1], "DequantizeLinear")
        if weight is None or not used_once(node.inputs[1]):
            continue
        codes, scale = constant(weight.inputs[0]), constant(weight.inputs[1])
        if codes is None or scale is None or codes.dtype != np.int8 or not codes.any():
            continue
        room = min(127, PAIR_LIMIT // (2 * largest_code(node.inputs[0]))) // int(np.abs(codes.astype(np.int16)).max())
        if room >= 2:
            factor = 2 ** int(np.log2(room))
            set_constant(weight, 0, (codes.astype(np.int16) * factor).astype(np.int8), ".codes")
            set_constant(weight, 1, (scale / factor).astype(np.float32), ".scale")
            count += 1
    return count


def narrow_codes(model: Any) -> int:
    """Store int8 constants that are dequantized as int4, two in a byte, where -8 to 7 holds them; changes no result.

    The bias of a convolution is added behind it: ONNX Runtime would round it to the product of the scales, which is
    coarse here (see [`widen_codes`]). It then runs such convolutions in float.

    Returns:
        How many were narrowed.
    """
    data_type = import_module("onnx_ir").DataType
    count = 0
    for node in nodes_of(model, "DequantizeLinear"):
        codes = constant(node.inputs[0])
        if codes is None or codes.dtype != np.int8 or len(node.inputs) > 2 or node.inputs[0].is_graph_output():
            continue
        if codes.size and codes.min() >= -8 and codes.max() <= 7:
            for user, _ in list(node.outputs[0].uses()):
                _add_bias_behind(user)
            set_constant(node, 0, codes.astype(data_type.INT4.numpy()), ".codes", data_type.INT4)
            count += 1
    return count


def _add_bias_behind(convolution: Any) -> None:
    bias = constant(convolution.inputs[2]) if convolution.op_type == "Conv" and len(convolution.inputs) > 2 else None
    if bias is None:
        return
    y = convolution.outputs[0]
    codes = constant(producer(convolution.inputs[1], "DequantizeLinear").inputs[0])
    assert codes is not None
    convolution.resize_inputs(2)
    shaped = add_initializer(convolution.graph, f"{y.name}.bias", bias.reshape(-1, *[1] * (codes.ndim - 2)))
    insert_behind(convolution, "Add", shaped)

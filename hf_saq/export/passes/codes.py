"""Store codes of at most 4 bits in 4 bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from .nodes import constant, nodes_of, set_constant


def narrow_codes(model: Any) -> int:
    """Store int8 constants that are dequantized as int4, two in a byte, where -8 to 7 holds them; changes no result.

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
            set_constant(node, 0, codes.astype(data_type.INT4.numpy()), ".codes", data_type.INT4)
            count += 1
    return count

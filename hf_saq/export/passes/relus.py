"""Let the range of codes do what a ReLU or ReLU6 before a quantization does."""

from __future__ import annotations

from typing import Any

import numpy as np

from .nodes import constant, insert_node, nodes_of, only_used_by, set_constant


def fold_relus_into_codes(model: Any) -> int:
    """Remove each `Relu`, and each `Clip` from 0 up, whose output is only quantized; clip the codes instead.

    Rounding is monotone, so clipping codes to the code of a bound gives what clipping values to the bound does.

    Returns:
        How many were removed.
    """
    count = 0
    for node in nodes_of(model, "Relu", "Clip"):
        bounds = _bounds(node)
        if bounds is None or not only_used_by(node.outputs[0], "QuantizeLinear"):
            continue
        quantizes = [user for user, _ in node.outputs[0].uses()]
        if not all(_is_plain(quantize) for quantize in quantizes):
            continue
        for quantize in quantizes:
            _clip_codes(quantize, bounds[1])
            quantize.replace_input_with(0, node.inputs[0])
        node.graph.remove(node, safe=True)
        count += 1
    return count


def _bounds(node: Any) -> tuple[float, float] | None:
    """Return 0 and the upper bound of a `Relu` or `Clip`; `None` if it is another function."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = (constant(value) if value is not None else None for value in (*node.inputs[1:], None, None)[:2])
    is_float = low is not None and low.dtype == np.float32 and low == 0
    return (0.0, float(high)) if is_float and high is not None else None


def _is_plain(quantize: Any) -> bool:
    """Tell whether codes are uint8 with constants as scale and zero point, and how many there are is known."""
    values = [constant(value) for value in quantize.inputs[1:]]
    return len(values) == 2 and all(value is not None and value.ndim == 0 for value in values)


def _clip_codes(quantize: Any, upper: float) -> None:
    """Clip what `quantize` puts out to the codes of zero and of the float `upper`."""
    scale, zero_point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    assert scale is not None and zero_point is not None
    clip = next((user for user, _ in quantize.outputs[0].uses() if user.op_type == "Clip"), None)
    low, high = (0, 255) if clip is None else (int(constant(value)) for value in clip.inputs[1:3])  # type: ignore[arg-type]
    # In float32, as an engine divides.
    of_upper = 255 if np.isinf(upper) else int(np.rint(np.float32(upper) / np.float32(scale))) + int(zero_point)
    new = max(low, int(zero_point)), min(high, of_upper)
    if new == (low, high):
        return
    bounds = [np.array(bound, dtype=np.uint8) for bound in new]
    if clip is None:
        codes = quantize.outputs[0]
        users = list(codes.uses())
        clipped = insert_node(users[0][0], "Clip", [codes, None, None])
        clip = clipped.producer()
        for user, index in users:
            user.replace_input_with(index, clipped)
    for index, bound in enumerate(bounds, start=1):
        set_constant(clip, index, bound, f".bound{index}")

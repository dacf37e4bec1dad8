"""Write convolutions as products of matrices, for an engine that runs those in integers and some convolutions not.

ONNX Runtime runs a `Conv` in integers only if its output is quantized next. Before a residual sum, a pooling or a
function it is not, and the convolution runs in float. A product with a bias behind it has no such condition. For
patches that do not overlap, as at the start of a ViT, nothing is copied twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .nodes import (
    add_bias,
    add_initializer,
    constant,
    insert_node,
    nodes_of,
    producer,
    replace_value,
    set_constant,
    set_integer,
    used_once,
)

FEWEST_CHANNELS = 8
"""Windows of fewer input channels are copied a few bytes at a time, which takes longer than is won."""
TO_LAST, FROM_LAST = [0, 2, 3, 1], [0, 3, 1, 2]
"""Permutations that bring the channels to the end, and back."""


def convolutions_to_products(model: Any, patches_only: bool = False) -> int:
    """Write each two-dimensional `Conv` of codes, whose output is not quantized next, as a `MatMul`.

    With the channels last, what each output sees of the codes is cut out by one slice for each place of the kernel,
    and the slices are put behind each other; the weight is stored in that order, `(places * channels, out)`. Where
    kernel and stride are the same, reshaping cuts out the patches, `(channels * places, out)`. Results change by the
    order of a sum. Grouped and dilated convolutions stay.

    Args:
        patches_only: Whether to leave convolutions whose kernels overlap.

    Returns:
        How many were written anew.
    """
    count = 0
    for node in nodes_of(model, "Conv"):
        dequantize, weight = producer(node.inputs[0], "DequantizeLinear"), producer(node.inputs[1], "DequantizeLinear")
        codes, scale = (None, None) if weight is None else (constant(value) for value in weight.inputs[:2])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if dequantize is None or codes is None or scale is None or not used_once(node.inputs[1]):
            continue
        if bias is not None and constant(bias) is None:
            continue
        if not _is_plain(node, codes) or (used_once(node.outputs[0]) and _is_quantized(node.outputs[0])):
            continue
        in_patches = _is_in_patches(node, codes)
        if not in_patches and (patches_only or codes.shape[1] < FEWEST_CHANNELS):
            continue
        order = (1, 2, 3, 0) if in_patches else (2, 3, 1, 0)
        set_constant(weight, 0, codes.transpose(order).reshape(-1, len(codes)), ".codes")
        if scale.ndim:
            set_integer(weight, "axis", 1)
        weight.outputs[0].shape = weight.inputs[0].shape
        windows = (_patches if in_patches else _windows)(node, dequantize, codes.shape[2:])
        x = insert_node(node, "DequantizeLinear", [windows, *dequantize.inputs[1:]])
        y = insert_node(node, "MatMul", [x, weight.outputs[0]])
        if bias is not None:
            y = add_bias(node, y, bias)
        replace_value(node.outputs[0], insert_node(node, "Transpose", [y], {"perm": FROM_LAST}))
        if not dequantize.outputs[0].uses() and not dequantize.outputs[0].is_graph_output():
            dequantize.graph.remove(dequantize, safe=True)
        count += 1
    return count


def _is_in_patches(convolution: Any, codes: np.ndarray) -> bool:
    """Tell whether each input goes into one window, and none is left over."""
    kernel, size = codes.shape[2:], convolution.outputs[0].shape[2:]
    strides, pads = _attribute(convolution, "strides", 1, 2), _attribute(convolution, "pads", 0, 4)
    given = convolution.inputs[0].shape
    return (
        list(kernel) == strides
        and max(kernel) > 1
        and not any(pads)
        and given is not None
        and list(given[2:]) == [int(length) * stride for length, stride in zip(size, strides, strict=True)]
    )


def _patches(convolution: Any, dequantize: Any, kernel: tuple[int, ...]) -> Any:
    """Cut codes into patches by reshaping: `(batch, height, width, channels * places)`."""
    graph, name = convolution.graph, convolution.inputs[1].name
    channels = int(convolution.inputs[0].shape[1])
    height, width = (int(length) for length in convolution.outputs[0].shape[2:])

    def shaped(value: Any, what: str, *shape: int) -> Any:
        return insert_node(convolution, "Reshape", [value, add_initializer(graph, f"{name}.{what}", np.array(shape))])

    codes = shaped(dequantize.inputs[0], "grid", 0, channels, height, kernel[0], width, kernel[1])  # 0 keeps the batch
    codes = insert_node(convolution, "Transpose", [codes], {"perm": [0, 2, 4, 1, 3, 5]})
    return shaped(codes, "patches", 0, height, width, channels * kernel[0] * kernel[1])


def _windows(convolution: Any, dequantize: Any, kernel: tuple[int, ...]) -> Any:
    """Cut out of the input's codes what each output sees: `(batch, height, width, places * channels)`."""
    graph, name = convolution.graph, convolution.inputs[1].name
    strides, pads = _attribute(convolution, "strides", 1, 2), _attribute(convolution, "pads", 0, 4)
    size = [int(length) for length in convolution.outputs[0].shape[2:]]
    codes = insert_node(convolution, "Transpose", [dequantize.inputs[0]], {"perm": TO_LAST})

    def vector(what: str, *values: int) -> Any:
        return add_initializer(graph, f"{name}.{what}", np.array(values))

    if any(pads):
        paddings = vector("pads", 0, *pads[:2], 0, 0, *pads[2:], 0)
        codes = insert_node(convolution, "Pad", [codes, paddings, dequantize.inputs[2]], {"mode": "constant"})
    if kernel == (1, 1) and strides == [1, 1]:
        return codes
    axes, steps = vector("axes", 1, 2), vector("strides", *strides)
    slices = []
    for first in np.ndindex(*kernel):
        last = [start + stride * (length - 1) + 1 for start, stride, length in zip(first, strides, size, strict=True)]
        bounds = [vector("start", *map(int, first)), vector("end", *map(int, last))]
        slices.append(insert_node(convolution, "Slice", [codes, *bounds, axes, steps]))
    return slices[0] if len(slices) == 1 else insert_node(convolution, "Concat", slices, {"axis": 3})


def _is_plain(node: Any, codes: np.ndarray) -> bool:
    attributes, shape = node.attributes, node.outputs[0].shape
    return (
        codes.ndim == 4
        and attributes.get_int("group", 1) == 1
        and set(_attribute(node, "dilations", 1, 2)) == {1}
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and shape is not None
        and all(isinstance(length, int) for length in shape[2:])
    )


def _is_quantized(value: Any) -> bool:
    return any(user.op_type == "QuantizeLinear" for user, _ in value.uses())


def _attribute(node: Any, name: str, default: int, count: int) -> list[int]:
    return list(node.attributes.get_ints(name, [default] * count))

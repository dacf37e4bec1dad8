"""Let convolutions pad themselves: zeros that are padded before a quantization are zeros after it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .nodes import constant, insert_node, nodes_of, only_used_by, producer


def move_pads_behind_codes(model: Any) -> int:
    """Move each `Pad` with zeros from before a quantization behind it, and from there into the convolution.

    Zero is a value of every grid that has an integer zero point, so no result changes.

    Returns:
        How many were moved behind a quantization. (Those that stood there already are fused too.)
    """
    count = 0
    for dequantize in nodes_of(model, "DequantizeLinear"):
        codes = dequantize.inputs[0]
        clip = producer(codes, "Clip")
        quantize = producer(codes if clip is None else clip.inputs[0], "QuantizeLinear")
        pad = None if quantize is None else producer(quantize.inputs[0], "Pad")
        if pad is None or not _pads_zeros(pad) or not only_used_by(dequantize.outputs[0], "Conv"):
            continue
        quantize.replace_input_with(0, pad.inputs[0])
        users = list(dequantize.outputs[0].uses())
        padded = insert_node(users[0][0], "Pad", [dequantize.outputs[0], *pad.inputs[1:]], {"mode": "constant"})
        dequantize.outputs[0].shape, padded.shape = pad.inputs[0].shape, pad.outputs[0].shape
        for user, index in users:
            user.replace_input_with(index, padded)
        if not pad.outputs[0].uses() and not pad.outputs[0].is_graph_output():
            pad.graph.remove(pad, safe=True)
        count += 1
    rules = import_module("onnxscript.rewriter.rules.common")
    import_module("onnxscript.rewriter").RewritePass([rules.fuse_pad_into_conv_rule])(model)
    return count


def _pads_zeros(pad: Any) -> bool:
    value = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else 0
    return pad.attributes.get_string("mode", "constant") == "constant" and value is not None and value == 0

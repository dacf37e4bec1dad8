"""Fold batch normalization into the scales and the bias of the convolution before it."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from .nodes import add_initializer, constant, nodes_of, producer, replace_value, set_constant, set_integer, used_once

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of torch's exporter: the names of the modules that a node comes from."""


def fold_batch_norms(model: Any) -> dict[str, str]:
    """Fold each `BatchNormalization` behind a `Conv` with stored codes, in float64.

    With `f = gamma / sqrt(variance + epsilon)` for each channel, scales become `|f|` times as large and codes change
    their sign where `f` is negative, so that the integers stay what they were. Results change by float rounding. A
    channel with the code -128, which has no opposite, and a negative `f` keeps its normalization as it is.

    Returns:
        Name of the layer -> name of the module whose normalization its weight now contains.
    """
    folded = {}
    for node in nodes_of(model, "BatchNormalization"):
        convolution = producer(node.inputs[0], "Conv")
        weight = None if convolution is None else producer(convolution.inputs[1], "DequantizeLinear")
        values = [constant(value) for value in node.inputs[1:]]
        if weight is None or not used_once(node.inputs[0]) or not used_once(weight.outputs[0]):
            continue
        codes, scale = constant(weight.inputs[0]), constant(weight.inputs[1])
        bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else np.zeros(1)
        if codes is None or scale is None or bias is None or any(value is None for value in values):
            continue
        gamma, beta, mean, variance = (np.asarray(value, dtype=np.float64) for value in values)
        factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        along = (-1, *[1] * (codes.ndim - 1))
        signs = np.where(factor < 0, -1, 1).reshape(along)
        if (signs * codes.astype(np.int16)).max() > 127:
            continue
        # A channel that is switched off keeps a scale to divide by.
        codes = np.where(factor.reshape(along) == 0, 0, signs * codes).astype(np.int8)
        scales = np.where(factor == 0, 1, np.abs(factor)) * scale
        set_constant(weight, 0, codes, ".codes")
        set_constant(weight, 1, scales.astype(np.float32), ".scale")
        set_integer(weight, "axis", 0)
        new_bias = ((bias - mean) * factor + beta).astype(np.float32)
        name = f"{weight.inputs[0].name.removesuffix('.codes')}.folded_bias"
        inputs = [*convolution.inputs[:2], add_initializer(convolution.graph, name, new_bias)]
        convolution.resize_inputs(3)
        convolution.replace_input_with(2, inputs[2])
        folded[weight.inputs[0].name.removesuffix(".codes")] = _module_of(node)
        replace_value(node.outputs[0], convolution.outputs[0])
    return folded


def _module_of(node: Any) -> str:
    """Name the innermost module that `node` comes from; the last entry of its scopes is the node itself."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""

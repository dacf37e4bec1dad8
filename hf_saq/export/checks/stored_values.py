"""Compare codes, scales and zero points of a shipped graph with those of the model, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ...layers import PackedLayer, QuantizedLayer
from ...quantizers import Quantizer
from ..passes.nodes import constant
from .spans import LayerSpan, stored_codes

SCALE_ROUNDING = 1e-6
"""How far a scale may be from its product with a folded normalization, relatively: a few roundings of float32."""


@torch.no_grad()
def wrong_weight(layer: QuantizedLayer | PackedLayer, span: LayerSpan, norm: nn.Module | None) -> str:
    """Say how the weight in the graph differs from that of `layer`; `""` if it does not.

    The graph may hold codes `n` and scales `t` with `n = m * code` and `t * m = scale * f`, where `m` is a power of
    two with a sign, and `f` the factor of the folded `norm`; odd codes `2 * code + 1` go with half the scale.
    """
    if isinstance(layer, PackedLayer):
        codes, scale, offset = layer.codes(), layer.weight_scale, layer.weight_offset
    else:
        assert layer.weight_quantizer is not None
        codes = layer.weight_quantizer.quantize(layer.weight)
        scale, offset = layer.weight_quantizer.grid(layer.weight)
        offset = offset if layer.weight_quantizer.has_offset else None
    axis = layer._functional.channel_axis if isinstance(layer, PackedLayer) else layer.channel_axis
    codes = codes.movedim(axis, 0)
    if span.product.op_type == "MatMul" and not span.in_patches:
        codes = codes.movedim(1, -1)  # a convolution that is written as a product goes over places, then channels
    code = codes.flatten(1).cpu().numpy().astype(np.int64)
    step = np.broadcast_to(scale.double().cpu().numpy().reshape(-1), len(code))
    factor = np.ones(len(code)) if norm is None else _factor(norm)
    found = _by_channel(stored_codes(span), span)
    t = np.broadcast_to(constant(span.weight.inputs[1]).reshape(-1).astype(np.float64), len(code))  # type: ignore[union-attr]
    reasons = []
    for half in (False, True) if offset is not None else (False,):
        n, s = (2 * code + 1, step / 2) if half else (code, step)
        reasons.append(_difference(found, t, n, s, factor, exactly=norm is None))
    return "" if "" in reasons else reasons[0]


def _difference(
    found: np.ndarray, t: np.ndarray, code: np.ndarray, step: np.ndarray, factor: np.ndarray, exactly: bool
) -> str:
    if found.shape[1] == 2 * code.shape[1]:  # two halves, against saturation
        found = found[:, : code.shape[1]] + found[:, code.shape[1] :]
    if found.shape != code.shape:
        return f"codes of shape {found.shape} by channel; expected {code.shape}"
    used = factor != 0
    ratio = np.where(used, step * np.abs(factor), 1) / np.where(used, t, 1)
    power = 2 ** np.round(np.log2(ratio))
    if np.abs(ratio / power - 1).max() > (0 if exactly else SCALE_ROUNDING):
        return f"a scale is off by a factor of {np.abs(ratio / power).max():.6g}"
    wrong = found != np.where(used, np.sign(factor) * power, 0)[:, None] * code
    return f"{wrong.sum()} of {wrong.size} codes differ" if wrong.any() else ""


def _factor(norm: Any) -> np.ndarray:
    variance = norm.running_var.double().cpu().numpy()
    gamma = 1.0 if norm.weight is None else norm.weight.double().cpu().numpy()
    return gamma / np.sqrt(variance + norm.eps)


def _by_channel(codes: np.ndarray, span: LayerSpan) -> np.ndarray:
    """Arrange codes of the graph as `(output channels, rest)`."""
    return np.moveaxis(codes, span.channel_axis, 0).reshape(codes.shape[span.channel_axis], -1)


@torch.no_grad()
def wrong_activation(quantizer: Quantizer, quantize: Any, clip: Any) -> str:
    """Say how the grid of an input in the graph differs from that of `quantizer`; `""` if it does not."""
    scale, zero_point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    expected = quantizer.grid()[0].reshape(()).float().cpu().numpy()
    if scale is None or scale.shape != () or scale != expected:
        return f"the scale of the input is {scale}; expected {expected}"
    if zero_point != -quantizer.qmin:
        return f"the zero point of the input is {zero_point}; expected {-quantizer.qmin}"
    bounds = (0, 255) if clip is None else tuple(int(constant(value)) for value in clip.inputs[1:])  # type: ignore[arg-type]
    largest = quantizer.qmax - quantizer.qmin
    if not 0 <= bounds[0] < bounds[1] <= largest:  # a ReLU may have narrowed them
        return f"codes of the input are in {bounds}; expected them in (0, {largest})"
    return ""

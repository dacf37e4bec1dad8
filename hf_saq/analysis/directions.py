"""Draw directions that compare models whose weights have different scales (Li et al., arXiv:1712.09913)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..layers import QuantizedLayer, quantized_form
from ..sharpness import Displacement
from .curvature import random_vector
from .weight_point import Vector, WeightPoint


def filter_normalized(point: WeightPoint, generator: torch.Generator) -> Vector:
    """Draw a random direction in which each filter has the norm of the filter of the point that it moves.

    A filter is what makes one output channel: a row of a linear layer, a kernel of a convolution. A model whose
    weights are twice as large is then moved twice as far, and batch norms cannot hide a scale (section 4 of the
    paper). Tensors of one dimension, biases and norms, are not moved, as in the paper's code.
    """
    axes = {layer.weight: _channel_axis(layer) for layer in point.model.modules() if hasattr(layer, "weight")}
    direction = random_vector(point, generator)
    for key, part, value in zip(point.keys, direction, point.values(), strict=True):
        if part.ndim < 2:
            part.zero_()
            continue
        axis = axes.get(key if isinstance(key, nn.Parameter) else key.weight, 0)
        part.mul_(_filter_norms(value, axis) / _filter_norms(part, axis).clamp_min(torch.finfo(part.dtype).tiny))
    return direction


def _channel_axis(layer: nn.Module) -> int:
    """Find the dimension of the weight of `layer`, quantized or not, that counts its output channels."""
    form = layer if isinstance(layer, QuantizedLayer) else quantized_form(layer)
    return form.channel_axis if form is not None else int(isinstance(layer, _ConvTransposeNd))


def before_quantizers(point: WeightPoint, vector: Vector) -> Displacement:
    """Add `vector` to latent weights, so that the model computes with `Q(w + d)` rather than with `Q(w) + d`."""
    parameters = [key if isinstance(key, nn.Parameter) else key.weight for key in point.keys]
    return Displacement(in_place=dict(zip(parameters, vector, strict=True)))


def _filter_norms(weight: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.ndim) if d != axis], keepdim=True)

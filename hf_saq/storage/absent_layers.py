"""Give values of their own to layers that a checkpoint does not have, or has in another size."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import conversion
from ..layers import PackedLayer, QuantizedLayer
from ..quantizers import Quantizer

logger = logging.getLogger(__name__)

NOT_STORED = "the checkpoint has no such layer; its weight is newly initialized"


def prepare_absent_layers(model: nn.Module) -> None:
    """Prepare layers whose weights transformers has just initialized; fit the weight scales after this.

    - A weight that did not come from the checkpoint, such as that of a head for other classes, gets its own scale: the
      scale of the layer it replaces would be far off.
    - A head of which the checkpoint has nothing, such as one on top of a stored base model, is quantized too; its
      input must still be calibrated.
    - Any other layer of which the checkpoint has nothing stays in float, such as the pooler of a base model whose
      classifier was stored: nobody decided how to quantize it.
    """
    heads = _outside_base_model(model)
    left = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLayer) and not _is_loaded(layer.weight):
            stored = any(_is_loaded(tensor) for q in layer.own_quantizers() for tensor in _tensors(q))
            if stored or layer in heads:
                _start_anew(layer, everything=not stored)
            else:
                conversion.leave_layer_in_float(model, name)
                left.append(name)
        elif isinstance(layer, PackedLayer) and layer not in heads and not any(map(_is_loaded, _tensors(layer))):
            conversion.replace_modules(model, {layer: _float_layer(model, layer)})
            left.append(name)
    if left:
        conversion.note_left_in_float(model, left, NOT_STORED)
        logger.warning(
            "%s: %s not in the checkpoint: newly initialized and left in float.", type(model).__name__, ", ".join(left)
        )


def absent_packed_layers(model: nn.Module) -> list[str]:
    """Name the packed layers whose codes did not come from the checkpoint."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    return [name for name, layer in layers.items() if not _is_loaded(layer.packed_weight)]


def _is_loaded(tensor: Tensor) -> bool:
    """Tell whether a tensor came from the checkpoint: transformers notes it on the tensor."""
    return getattr(tensor, "_is_hf_initialized", False)


def _tensors(layer: nn.Module) -> Iterable[Tensor]:
    return layer.state_dict(keep_vars=True).values()


def _outside_base_model(model: nn.Module) -> set[nn.Module]:
    base = getattr(model, "base_model", model)
    return set() if base is model else set(model.modules()) - set(base.modules())


def _start_anew(layer: QuantizedLayer, everything: bool) -> None:
    """Forget the range of the weight quantizer, or with `everything` the ranges of all quantizers of the layer."""
    for quantizer in layer.own_quantizers():
        if everything or quantizer.role == "weight":
            _forget(quantizer)


def _forget(quantizer: Quantizer) -> None:
    quantizer.reset()
    _count_as_loaded(quantizer)


def _count_as_loaded(module: nn.Module) -> None:
    for tensor in _tensors(module):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]


@torch.no_grad()
def _float_layer(model: Any, layer: PackedLayer) -> nn.Module:
    weight = nn.Parameter(layer.weight.new_empty(layer.weight_shape))
    new = layer.float_form.build(weight, like=layer)
    model._init_weights(new)
    _count_as_loaded(new)
    return new

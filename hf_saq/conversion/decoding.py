"""Choose whether packed layers decode their weight at every call or once."""

from __future__ import annotations

import torch
from torch import nn

from ..layers import PackedLayer


def keep_decoded(model: nn.Module, keep: bool = True) -> int:
    """Let the packed layers of `model` decode their weights once, at the next call, and keep them in memory.

    By default they decode at every call, which keeps a packed model as small in memory as it is on disk. Kept weights
    take what those of the float model do, and calls save the decoding, which is a good part of them at small batches.
    Results are the same. Codes that are loaded or moved later are decoded again; what is saved or copied has no
    decoded weights. Where the model is compiled, or was made inside `torch.inference_mode`, layers go on decoding at
    each call.

    Args:
        keep: `False` drops the decoded weights and goes back to the default.

    Returns:
        Bytes of memory that the decoded weights take, or took.

    Raises:
        ValueError: If the model has no packed layer.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not packed; expected a model made by `pack` or a packed checkpoint. Other "
            "models have no codes to decode."
        )
    for layer in layers:
        layer.keep_decoded(keep)
    return sum(torch.Size(layer.weight_shape).numel() * layer.weight.element_size() for layer in layers)

"""Optimizer groups of a quantized model: step sizes and clips learn at a rate of their own and do not decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..quantizers import Quantizer
from ..sharpness import kinds_of_parameters


def quantizer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Step sizes, clips and offsets. Weight decay would shrink their grid."""
    return {p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, scale_lr_ratio: float = 0.1
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer: weights that decay; biases and norms that do not; quantizers' values.

    Args:
        scale_lr_ratio: Learning rate of the quantizers' values, relative to `learning_rate`.
    """
    kinds = kinds_of_parameters(model)
    trained = {p: kind for p, kind in kinds.items() if p.requires_grad}
    groups = [
        {"params": [p for p, kind in trained.items() if kind in ("weight", "other")], "weight_decay": weight_decay},
        {"params": [p for p, kind in trained.items() if kind in ("bias", "norm", "scale")], "weight_decay": 0.0},
    ]
    groups = [{**group, "lr": learning_rate} for group in groups if group["params"]]
    return groups + split_off_scales(groups, model, scale_lr_ratio)


def split_off_scales(groups: Iterable[dict[str, Any]], model: nn.Module, ratio: float) -> list[dict[str, Any]]:
    """Take the quantizers' values out of each group, in place, into a copy of it with `ratio` times its rate.

    Returns:
        The new groups, to be added to the optimizer.
    """
    scales = quantizer_parameters(model)
    new = []
    for group in groups:
        own = [p for p in group["params"] if p in scales]
        if own:
            group["params"] = [p for p in group["params"] if p not in scales]
            new.append({**group, "params": own, "lr": group["lr"] * ratio})
    return new

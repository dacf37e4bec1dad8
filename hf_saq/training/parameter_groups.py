"""Make optimizer groups of a quantized model: step sizes and clips have their own learning rate and do not decay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..quantizers import Quantizer
from ..sharpness import kinds_of_parameters


def quantizer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the step sizes, clips and offsets of all quantizers. Weight decay would shrink their grids."""
    return {p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, scale_lr_ratio: float = 0.1
) -> list[dict[str, Any]]:
    """Make groups for any `torch.optim` optimizer: weights, which decay; biases and norms; values of quantizers.

    Args:
        model: A quantized model; parameters that are not trainable are left out.
        learning_rate: Learning rate of all but the quantizers' values.
        weight_decay: Weight decay of weights and embeddings; biases, norms and quantizers' values have none.
        scale_lr_ratio: Learning rate of the quantizers' values, relative to `learning_rate`.

    Returns:
        Dicts with `params`, `lr` and `weight_decay`.
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
    """Move the quantizers' values out of each group, in place, into a copy of it with `ratio` times its learning rate.

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


def tell_of_another_rate(groups: Iterable[dict[str, Any]], model: nn.Module, ratio: float) -> None:
    """Warn if the quantizers' values learn at another rate than `ratio` times that of the weights.

    Schedulers that set the rate of each group by themselves, and a checkpoint, take the place of what was asked for.

    Args:
        groups: Of an optimizer that `split_off_scales` was applied to, with the first rates that schedulers keep.
    """
    scales = quantizer_parameters(model)
    first = [(g["initial_lr"], scales.issuperset(g["params"])) for g in groups if g["params"] and "initial_lr" in g]
    own, others = ([float(rate) for rate, is_own in first if is_own is kind] for kind in (True, False))
    if own and others and max(others) > 0 and not math.isclose(max(own) / max(others), ratio, rel_tol=1e-6):
        warnings.warn(
            f"SAQTrainer: step sizes of quantizers learn at {max(own) / max(others):g} times the rate of the weights, "
            f"not at SAQConfig.scale_lr_ratio={ratio:g}: the scheduler sets rates of its own (give OneCycleLR a "
            "max_lr for each group of the optimizer), or the checkpoint has those of another ratio.",
            stacklevel=3,
        )

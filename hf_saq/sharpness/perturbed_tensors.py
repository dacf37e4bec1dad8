"""Which tensors of a model are perturbed: quantized weights at their quantizer's output, the others in place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..quantizers import Quantizer


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A latent weight `w` and the quantizer that makes `w_q` of it."""

    name: str
    weight: nn.Parameter
    quantizer: Quantizer


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """Every trainable weight that a weight quantizer reads, once for each quantizer."""
    found: list[QuantizedWeight] = []
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        weight = getattr(module, "weight", None)
        if isinstance(quantizer, Quantizer) and isinstance(weight, nn.Parameter) and weight.requires_grad:
            found.append(QuantizedWeight(name, weight, quantizer))
    return found


def is_normalization(module: nn.Module) -> bool:
    """Batch, layer, group, RMS and other norms, torch's or a library's own."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def kinds_of_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter's kind: `weight` (quantized), `bias`, `norm`, `scale` (of a quantizer) or `other`.

    A parameter shared by several modules takes the first kind that fits: weight, scale, norm, bias, other.
    """
    latent = {entry.weight for entry in quantized_weights(model)}
    kinds: dict[nn.Parameter, str] = {}
    rank = ("weight", "scale", "norm", "bias", "other")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in latent:
                kind = "weight"
            elif isinstance(module, Quantizer):
                kind = "scale"
            elif is_normalization(module):
                kind = "norm"
            else:
                kind = "bias" if name == "bias" or name.endswith("_bias") else "other"
            if parameter not in kinds or rank.index(kind) < rank.index(kinds[parameter]):
                kinds[parameter] = kind
    return kinds


def in_place_parameters(model: nn.Module, perturb: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters, without the quantized weights, whose kind is in `perturb`."""
    kinds = kinds_of_parameters(model)
    return [(n, p) for n, p in model.named_parameters() if kinds[p] != "weight" and kinds[p] in perturb]

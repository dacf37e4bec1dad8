"""Find which tensors of a model are perturbed: quantized weights at their quantizer's output, the others in place."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from ..quantizers import Quantizer

KINDS = ("weight", "scale", "norm", "bias", "other")
"""Kinds of parameters. A parameter that several modules share has the first kind that fits."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Norms of torch, of which others are subclasses, whatever they are called."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Holds a latent weight `w` and the quantizer that makes `w_q` of it."""

    name: str
    weight: nn.Parameter
    quantizer: Quantizer


class PerturbedTensors:
    """Holds the tensors that a perturbation may move in a model, as the model is now.

    Args:
        model: If its parameters are replaced, frozen or unfrozen later, [`is_current`] returns false.
        perturb: Kinds of tensors, some of `KINDS`.
        inside: Names of the modules whose tensors may be moved; `None`: all.

    Attributes:
        weights: Trainable quantized weights, once for each quantizer, in the order of `named_modules`.
        in_place: Trainable parameters that are moved themselves, without the quantized weights.
        latent: Parameter behind each of `weights` -> one of its entries.
        by_quantizer: Quantizer of each of `weights` -> the entry.
        without_size: Those of `in_place` that the adaptive form does not scale: biases.
        costly: Parameters whose gradients a first pass may leave out if it does not need them.

    Raises:
        ValueError: If `perturb` holds something else.
    """

    _signature: list[tuple[int, bool]] | None = None

    def __init__(self, model: nn.Module, perturb: Collection[str], inside: Collection[str] | None = None):
        if not set(perturb) <= set(KINDS):
            raise ValueError(f"perturb={perturb!r}; expected a list of some of {list(KINDS)}.")
        self.parameters = list(model.parameters())
        self._signature = _signature(model)
        kinds = kinds_of_parameters(model)
        movable = {p for name, p in model.named_parameters() if inside is None or name in inside}
        in_place = [(name, p) for name, p in in_place_parameters(model, perturb) if p in movable]
        weights = quantized_weights(model) if "weight" in perturb else []
        if "weight" in perturb and "other" not in perturb and in_place and "weight" not in kinds.values():
            warnings.warn(
                f"perturb={list(perturb)}: no weight of {type(model).__name__} is quantized, and `weight` means those "
                f"that are, so that {len(in_place)} other tensors, such as {in_place[0][0]}, are all that is "
                'perturbed. Quantize the weights (weight_bits), or add "other", which perturbs those in float.',
                stacklevel=2,
            )
        self.weights = [entry for entry in weights if entry.weight in movable]
        self.in_place = [p for _, p in in_place]
        self.latent = {entry.weight: entry for entry in self.weights}
        self.by_quantizer = {entry.quantizer: entry for entry in self.weights}
        self.without_size = {p for name, p in in_place if name.endswith("bias")}
        # Leave out biases and norms: their gradients cost next to nothing, and with them the graph begins as early as
        # in a plain pass. Reentrant checkpointing drops the gradients of a block if none of its inputs requires one.
        self.costly = [p for p, kind in kinds.items() if kind not in ("bias", "norm")]

    def is_current(self, model: nn.Module) -> bool:
        """Tell whether `model` still has the same parameters, and the same ones are trainable."""
        return _signature(model) == self._signature

    def __getstate__(self) -> dict:
        """Leave all out of copies and pickles: there they are the tensors of no model, and not current."""
        return {}

    def __bool__(self) -> bool:
        return bool(self.weights or self.in_place)


def as_kinds(perturb: str | Collection[str]) -> tuple[str, ...]:
    """List kinds of tensors, of which a single one may be given by its name."""
    return (perturb,) if isinstance(perturb, str) else tuple(perturb)


def nothing_selected(model: nn.Module, perturb: Collection[str]) -> ValueError:
    """Make the error for kinds of tensors that `model` has none of."""
    frozen = sum(not p.requires_grad for p in model.parameters())
    thaw = f", set requires_grad=True of some of its {frozen} frozen parameters" if frozen else ""
    return ValueError(
        f"perturb={list(perturb)} selects no trainable tensor of {type(model).__name__}. Quantize the model "
        f'first{thaw}, or add "other" to perturb weights that are not quantized.'
    )


def _signature(model: nn.Module) -> list[tuple[int, bool]]:
    return [(id(p), p.requires_grad) for p in model.parameters()]


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """List every trainable weight that a weight quantizer reads, once for each quantizer."""
    return [
        QuantizedWeight(name, weight, quantizer)
        for name, weight, quantizer in _weights_behind_quantizers(model)
        if weight.requires_grad
    ]


def is_normalization(module: nn.Module) -> bool:
    """Tell whether `module` is a batch, layer, group, RMS or other norm, torch's or a library's own.

    One may hold an activation or dropout, as those of timm do. What holds layers, such as a block of a convolution and
    its norm, is none.
    """
    if isinstance(module, NORMS):
        return True
    holds_layers = any(True for child in module.children() for _ in child.parameters())
    return "norm" in type(module).__name__.lower() and not holds_layers


def kinds_of_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Map each parameter to its kind: `weight` (quantized), `bias`, `norm`, `scale` (of a quantizer) or `other`."""
    latent = {weight for _, weight, _ in _weights_behind_quantizers(model)}
    kinds: dict[nn.Parameter, str] = {}
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
            if parameter not in kinds or KINDS.index(kind) < KINDS.index(kinds[parameter]):
                kinds[parameter] = kind
    return kinds


def in_place_parameters(model: nn.Module, perturb: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    """List names and trainable parameters, without quantized weights, whose kind is in `perturb`."""
    kinds = kinds_of_parameters(model)
    wanted = set(perturb) - {"weight"}
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and kinds[p] in wanted]


def _weights_behind_quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Quantizer]]:
    for name, module in model.named_modules():
        quantizer, weight = getattr(module, "weight_quantizer", None), getattr(module, "weight", None)
        if not isinstance(quantizer, Quantizer):
            continue
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name}: its weight is computed from other parameters since it was quantized (pruning, weight or "
                "spectral norm), so that it cannot be perturbed. Make that permanent first: "
                "`torch.nn.utils.prune.remove`, `remove_weight_norm` and the like."
            )
        yield name, weight, quantizer

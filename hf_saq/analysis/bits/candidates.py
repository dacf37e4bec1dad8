"""Let one operand of a quantized layer have other bits for a moment, and everything else stay as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...conversion.observing import ActivationObserver, PassThrough
from ...layers import HoldsQuantizers, QuantizedLayer
from ...quantizers import Observer, Quantizer
from ..batch_losses import LabelledBatches, refuse_not_finite
from .changing import with_bits

Operand = Literal["weight", "activation"]
CALIBRATION_BATCHES = 8
"""Batches that candidates for activations are fitted to, at most."""


@dataclass(frozen=True, eq=False)
class QuantizedOperand:
    """Holds the quantizers that share their bits in one layer: that of the weight, or those of activations.

    A linear layer or a convolution has one quantizer of each kind, the products of an attention four for activations.
    `shared_with` names the other layers that read the tensor which the quantizers quantize once (`share_inputs`).
    """

    name: str
    operand: Operand
    quantizers: tuple[Quantizer, ...]
    weight: Tensor | None
    shared_with: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        return self.quantizers[0].bits


def quantized_operands(model: nn.Module) -> list[QuantizedOperand]:
    """List the operands of all quantized layers, in the order of `named_modules`, the weight of a layer first."""

    def readers(of: str, quantizers: list[Quantizer]) -> tuple[str, ...]:
        layers = ((name, getattr(module, "activation_quantizer", None)) for name, module in model.named_modules())
        return tuple(name for name, one in layers if one is not None and one in quantizers and name != of)

    found = []
    for name, module in model.named_modules():
        if not isinstance(module, HoldsQuantizers):
            continue
        weight = [q for q in module.own_quantizers() if q.role == "weight"]
        activations = [q for q in module.own_quantizers() if q.role == "activation"]
        if weight:
            assert isinstance(module, QuantizedLayer)
            found.append(QuantizedOperand(name, "weight", tuple(weight), module.weight))
        if activations:
            found.append(QuantizedOperand(name, "activation", tuple(activations), None, readers(name, activations)))
    return found


class Candidates:
    """Makes quantizers of other bits for the operands of a model: the same kind, fitted to the same data.

    Where an operand has these bits already, its own quantizer is the candidate, with what it has learned.

    Args:
        seen: What each activation quantizer sees, as [`observe_activations`] returns it.
    """

    def __init__(self, seen: Mapping[Quantizer, tuple[Tensor, float]]):
        self._seen = seen
        self._made: dict[tuple[Quantizer, int], Quantizer] = {}

    @torch.no_grad()
    def of(self, operand: QuantizedOperand, bits: int) -> dict[Quantizer, Quantizer]:
        """Map each quantizer of `operand` to the one that takes its place."""
        found = {}
        for quantizer in operand.quantizers:
            if bits != quantizer.bits and (quantizer, bits) not in self._made:
                seen = self._seen[quantizer] if operand.weight is None else (operand.weight,)
                self._made[quantizer, bits] = with_bits(quantizer, bits, *seen)
            found[quantizer] = quantizer if bits == quantizer.bits else self._made[quantizer, bits]
        return found


@torch.no_grad()
def observe_activations(model: nn.Module, data: LabelledBatches) -> tuple[dict[Quantizer, tuple[Tensor, float]], int]:
    """Run some batches in float, as `calibrate` does.

    Returns:
        For each activation quantizer that runs a sample `(n,)` and the smallest value; how many batches were run.
    """
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    observers = {q: ActivationObserver(q.path) for q in quantizers if q.role == "activation"}
    count = min(len(data), CALIBRATION_BATCHES)
    with observed({q: observers.get(q, PassThrough()) for q in quantizers}):
        for number in range(count):
            refuse_not_finite("sensitivity, with every quantizer off", number, data.loss(model, number).item())
    return {q: (torch.cat(o.samples), o.minimum) for q, o in observers.items() if o.samples}, count


@contextmanager
def observed(observers: Mapping[Quantizer, Observer]) -> Iterator[None]:
    """Let quantizers show their input to observers inside the block, and return it unchanged."""
    for quantizer, observer in observers.items():
        quantizer.observer = observer
    try:
        yield
    finally:
        for quantizer in observers:
            quantizer.observer = None


@contextmanager
def replaced(candidates: Mapping[Quantizer, Quantizer]) -> Iterator[None]:
    """Let the outputs of quantizers be those of others inside the block, whether or not they are observed."""

    def of_the_other(quantizer: nn.Module, args: Sequence[Any], output: Tensor) -> Tensor:  # noqa: ARG001
        return candidates[quantizer].fake_quantize(args[0])  # type: ignore[index]

    handles = [quantizer.register_forward_hook(of_the_other) for quantizer in candidates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

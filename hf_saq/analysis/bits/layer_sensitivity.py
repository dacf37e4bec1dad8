"""Measure, for every quantized layer and several bits, what quantizing it alone costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...conversion.observing import PassThrough
from ...layers.as_written import run_as_written
from ...outputs import logits_of
from ...progress import progress_bar
from ...quantizers import Quantizer
from ...quantizers.settings import check_bits
from ...tables import text_table
from ..agreement import agreement, signal_to_noise
from ..batch_losses import LabelledBatches, Loss, deviation, left_as_it_was, refuse_not_finite, warn_of_few_digits
from ..results import Result, new_figure
from ..weight_point import WeightPoint
from .candidates import Candidates, Operand, observe_activations, observed, quantized_operands, replaced
from .estimates import Key, activation_estimates, weight_estimates

CANDIDATES = (2, 3, 4, 6, 8)
PARTS = 2
"""Parts of a batch that a measurement sees where there are too few batches for the passes that are allowed."""
SHARE_OF_ESTIMATES = 0.25
"""Part of the allowed passes that the estimates may take."""


@dataclass(frozen=True)
class OperandSensitivity:
    """Holds what certain bits of one operand of one layer do to the model.

    Attributes:
        name: The layer.
        operand: `"weight"` or `"activation"`; the layer's other operand is left as it is.
        bits: The bits that were tried, and in `present_bits` those that the operand has in the model.
        loss_rise: Mean loss minus that of the base, and in `error` the standard error over batches.
        agreement: Share of predictions that are those of the float model.
        snr: Signal to noise of the logits in decibels: `10 log10(|y|^2 / |y - y'|^2)`, with `y` of the float model.
        estimate: Rise of the loss by gradient and curvature; NaN for a frozen weight.
        shared_with: Other layers that read the same tensor, quantized once for all (`share_inputs`): what was found is
            that of all of them together.
    """

    name: str
    operand: Operand
    bits: int
    present_bits: int
    loss_rise: float
    error: float
    agreement: float
    snr: float
    estimate: float
    shared_with: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Return the name, and the last parts of those of the layers that share the operand."""
        others = ", ".join(name.rpartition(".")[2] for name in self.shared_with)
        return f"{self.name} + {others}" if others else self.name


@dataclass(frozen=True)
class Sensitivity(Result):
    """Holds what [`sensitivity`] finds; `print` shows a table, most sensitive first, `plot(file)` draws it.

    Attributes:
        base: `"float"` if everything else was in float, `"quantized"` if it was as it is in the model.
        loss: Loss of the base on the batches measured.
        entries: One for each layer, operand and number of bits.
        batches_measured: On how many batches each was measured.
        rank_correlation: Spearman's, of estimated and measured rises, for `"weight"` and `"activation"`.
        passes: What all of it cost, in forward passes over all data; a backward pass counts as two.
    """

    base: str
    loss: float
    entries: tuple[OperandSensitivity, ...]
    batches_measured: int
    rank_correlation: dict[str, float]
    passes: float

    def entry(self, name: str, operand: Operand, bits: int) -> OperandSensitivity:
        """Return the entry of one layer, operand and number of bits.

        Raises:
            KeyError: If it was not measured.
        """
        for entry in self.entries:
            if (entry.name, entry.operand, entry.bits) == (name, operand, bits):
                return entry
        raise KeyError(f"sensitivity: {name} has no entry for {bits} bits of its {operand}; measure these candidates.")

    def ranking(self) -> list[tuple[str, Operand]]:
        """List layers and operands by the rise of the loss at the fewest bits, the largest first."""
        fewest = min(entry.bits for entry in self.entries)
        lowest = [entry for entry in self.entries if entry.bits == fewest]
        return [(e.name, e.operand) for e in sorted(lowest, key=lambda e: -e.loss_rise)]

    def __str__(self) -> str:
        bits = sorted({entry.bits for entry in self.entries})
        fewest = bits[0]
        head = ("layer", "operand", "bits", *(f"rise at {b}" for b in bits))
        rows = [(*head, f"agreement at {fewest}", f"SNR at {fewest}, dB")]
        for name, operand in self.ranking():
            entries = [self.entry(name, operand, b) for b in bits]
            rises = [f"{entry.loss_rise:.3g}" for entry in entries]
            worst = entries[0]
            rows.append(
                (worst.label, operand, str(worst.present_bits), *rises, f"{worst.agreement:.1%}", f"{worst.snr:.1f}")
            )
        ranks = ", ".join(f"{value:.2f} ({operand}s)" for operand, value in self.rank_correlation.items())
        return (
            f"{text_table(rows, right=range(2, len(rows[0])))}\n"
            f"loss {self.loss:.4g} with everything else {'in float' if self.base == 'float' else 'as it is'}; "
            f"{self.batches_measured} batches each; rank correlation of estimates {ranks}; "
            f"{self.passes:.1f} passes over the data"
        )

    def plot(self, file: str | PathLike[str]) -> None:
        """Draw the rise of the loss for every layer, one line for each number of bits, into `file`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        operands = [o for o in ("weight", "activation") if any(e.operand == o for e in self.entries)]
        names = list(dict.fromkeys(name for entry in self.entries for name in (entry.name, *entry.shared_with)))
        figure = new_figure(4.5 * len(operands) + 1, 1.6 + 0.22 * len(names))
        panels = figure.subplots(1, len(operands), squeeze=False, sharey=True)[0]
        places = {name: k for k, name in enumerate(names)}
        for panel, operand in zip(panels, operands, strict=True):
            for b in sorted({entry.bits for entry in self.entries}):
                chosen = [e for e in self.entries if e.operand == operand and e.bits == b]
                drawn = [(e.loss_rise, places[name]) for e in chosen for name in (e.name, *e.shared_with)]
                panel.plot(*zip(*drawn, strict=True), "o", markersize=4, label=f"{b} bits")
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set(title=f"{operand}s", xlabel="rise of the loss")
            panel.grid(axis="y", alpha=0.3)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(file)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    float_model: nn.Module | None = None,
    *,
    candidates: Sequence[int] = CANDIDATES,
    base: Literal["float", "quantized"] = "float",
    passes: float = 16.0,
    trace_samples: int = 4,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Measure what quantizing one operand of one layer alone costs, for every layer, weights and activations apart.

    Beside each measured rise of the loss stands an estimate by gradient and curvature, which costs a few passes for
    all layers together (see `estimates.py`). An operand gets the quantizer that it has, if that has these bits,
    and otherwise a new one of the same kind, fitted to the weight or to activations in float. The model runs in
    evaluation mode and is left as it was.

    Args:
        model: A quantized, calibrated model.
        batches: Dicts of keyword inputs with labels, or pairs `(inputs, labels)`; with `loss`, of any type. The model
            must return logits. `passes` limits how many of them each measurement sees, the same for all, evenly
            spread; where even one is too much, dicts and pairs of tensors are cut into smaller ones.
        float_model: What predictions and logits are compared with; by default `model` with all its quantizers off.
        candidates: Bits to try, each 2 to 8.
        base: `"float"`: everything else is in float, so that a rise is the cost of one operand alone. `"quantized"`:
            everything else is as it is, so that a fall is what more bits for one operand would win.
        passes: Most forward passes over all data, where a backward pass counts as two. Each measurement needs one
            example at least, so with few examples it may be more; the result says how many it was.
        trace_samples: Vectors for the traces of the Hessian, >= 2.
        loss: Computes the mean loss from model and batch.
        seed: Seed of these vectors.
        progress: Whether to show a bar after a few seconds.

    Raises:
        ValueError: If an argument is out of range, the model or the batches are not what is expected, or a loss of
            the base is not finite.
    """
    bits = sorted(set(candidates))
    if not bits:
        raise ValueError("sensitivity: `candidates` is empty; expected numbers of bits, such as (2, 4, 8).")
    for b in bits:
        check_bits("sensitivity: candidates", b)
    if base not in ("float", "quantized"):
        raise ValueError(f"sensitivity: base={base!r}; expected 'float' or 'quantized'.")
    if not passes > 0 or trace_samples < 2:
        raise ValueError(f"sensitivity: passes={passes}, trace_samples={trace_samples}; expected > 0 and >= 2.")
    data = LabelledBatches("sensitivity", batches, loss)
    operands = quantized_operands(model)
    if not operands:
        raise ValueError(
            f"sensitivity: {type(model).__name__} has no quantizer; expected a model made by `quantize`, not packed "
            "(see `unpack`)."
        )
    warn_of_few_digits("sensitivity", model)
    off = {m: PassThrough() for m in model.modules() if isinstance(m, Quantizer)}
    others = off if base == "float" else {}
    with left_as_it_was(model), left_as_it_was(model if float_model is None else float_model):
        seen, observed_batches = observe_activations(model, data)
        fitted = Candidates(seen)
        operands = [o for o in operands if o.operand == "weight" or all(q in seen for q in o.quantizers)]
        weights = [o for o in operands if o.operand == "weight"]
        activations = [o for o in operands if o.operand == "activation"]
        estimate_cost = (2 + 2 * (2 + trace_samples)) * bool(weights) + 3 * bool(activations)
        share = SHARE_OF_ESTIMATES * passes / estimate_cost  # of the data, which the estimates may see
        # Few large batches are cut into parts, so that they leave something to the measurements, and these see some.
        parts = data if share * len(data) >= 1 else data.split_to(math.ceil(1 / share))
        part = parts.spread(int(share * len(parts)))
        estimates: dict[Key, float] = {}
        with observed(others):
            if any(o.weight.requires_grad for o in weights):  # type: ignore[union-attr]
                point = WeightPoint("sensitivity", model, ("weight",))
                generator = torch.Generator("cpu").manual_seed(seed)
                estimates |= weight_estimates(point, part, weights, bits, fitted, trace_samples, generator)
            if activations:
                estimates |= activation_estimates(model, part, activations, bits, fitted)
        runs = len(operands) * len(bits) + 2
        spent = observed_batches / len(data) + estimate_cost * len(part) / len(parts)
        left = max(passes - spent, 0.0)
        pieces = data if left * len(data) >= runs else data.split_to(math.ceil(PARTS * runs / max(left, 1)))
        measured = pieces.spread(int(left * len(pieces) / runs))
        spent += runs * len(measured) / len(pieces)
        entries = []
        with progress_bar(len(operands) * len(bits), "sensitivity", progress) as bar:
            with observed(off) if float_model is None else nullcontext():
                reference = _run(model if float_model is None else float_model, measured)[1]
            axes = [measured.class_axis(number, one) for number, one in enumerate(reference)]
            with observed(others):
                before = _run(model, measured)[0]
                for number, loss_of_batch in enumerate(before):
                    refuse_not_finite("sensitivity", number, loss_of_batch)
                for operand in operands:
                    for b in bits:
                        with replaced(fitted.of(operand, b)):
                            after, logits = _run(model, measured)
                        rises = [x - y for x, y in zip(after, before, strict=True)]
                        entries.append(
                            OperandSensitivity(
                                name=operand.name,
                                operand=operand.operand,
                                bits=b,
                                present_bits=operand.bits,
                                loss_rise=measured.mean(rises),
                                error=deviation(rises) / len(rises) ** 0.5,
                                agreement=agreement(logits, reference, axes),
                                snr=signal_to_noise(logits, reference),
                                estimate=estimates.get((operand.name, operand.operand, b), float("nan")),
                                shared_with=operand.shared_with,
                            )
                        )
                        bar.update()
    correlations = {}
    for kind in ("weight", "activation"):
        pairs = [(e.estimate, e.loss_rise) for e in entries if e.operand == kind and e.estimate == e.estimate]
        if len(pairs) > 1:
            correlations[kind] = rank_correlation(*zip(*pairs, strict=True))
    return Sensitivity(base, measured.mean(before), tuple(entries), len(measured), correlations, spent)


@torch.no_grad()
def _run(model: nn.Module, data: LabelledBatches) -> tuple[list[float], list[Tensor]]:
    """Return the losses of all batches, and the logits that the model returned on the way, on the CPU."""
    logits: list[Tensor] = []

    def keep(model: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001 (a forward hook)
        logits.append(logits_of(output, may_be_first=True).cpu())

    handle = model.register_forward_hook(keep)
    try:
        with run_as_written():
            return data.each_loss(model), logits
    finally:
        handle.remove()


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute Spearman's rank correlation. Equal values share their mean rank; NaN if all values of one are equal."""
    ranks = []
    for values in (a, b):
        unique, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        if len(unique) < 2:
            return float("nan")
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[places])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])

"""Put two models side by side: do they predict the same, where do they part, and in which layer does it begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..layers import PackedLayer, QuantizedLayer
from ..layers.as_written import run_as_written
from ..outputs import logits_of
from ..progress import progress_bar
from ..tables import text_table
from .agreement import NO_PREDICTION, decibels, predictions
from .batch_losses import LabelledBatches, Loss, left_as_it_was
from .results import Result, new_figure

COMPARED = (QuantizedLayer, PackedLayer, nn.Linear, _ConvNd)
PARTED = 10
"""How many of the examples whose predictions differ are listed."""


@dataclass(frozen=True)
class LayerDifference:
    """Holds the signal to noise of one layer's output in decibels: `10 log10(|y_a|^2 / |y_b - y_a|^2)`."""

    name: str
    snr: float


@dataclass(frozen=True)
class Parted:
    """Holds an example whose predictions differ: its number over all batches, both predictions, `|y_b - y_a|`.

    A prediction is `None` where one of the scores is NaN.
    """

    example: int
    prediction_a: int | None
    prediction_b: int | None
    distance: float


@dataclass(frozen=True)
class Comparison(Result):
    """Holds what [`compare`] finds; `print` shows a table, `plot(file)` draws the layers.

    Attributes:
        examples: How many were compared.
        loss_a: Mean loss of the first model, and in `loss_b` of the second.
        agreement: Share of equal predictions; an example with scores that are NaN has none, and counts as different.
        snr: Signal to noise of the logits in decibels.
        layers: Layers that both models have, in the order of `named_modules` of the first.
        parted: Examples whose predictions differ, those without one first, then the most distant logits, 10 at most.
        nan_a: How many examples have scores that are NaN in the first model, and in `nan_b` in the second.
    """

    examples: int
    loss_a: float
    loss_b: float
    agreement: float
    snr: float
    layers: tuple[LayerDifference, ...]
    parted: tuple[Parted, ...]
    nan_a: int = 0
    nan_b: int = 0

    def __str__(self) -> str:
        rows = [("layer", "SNR, dB"), *((layer.name, f"{layer.snr:.1f}") for layer in self.layers)]
        rows.append(("logits", f"{self.snr:.1f}"))
        lines = [
            text_table(rows, right=(1,)),
            f"loss {self.loss_a:.4g} and {self.loss_b:.4g}; {self.agreement:.1%} of {self.examples} predictions agree",
        ]
        for which, count in (("first", self.nan_a), ("second", self.nan_b)):
            if count:
                lines.append(
                    f"the {which} model gives scores that are NaN to {count:,} of {self.examples:,} examples, which "
                    "predict nothing: its training has diverged, or its files are damaged"
                )
        for p in self.parted:
            a, b = ("nothing" if k is None else k for k in (p.prediction_a, p.prediction_b))
            lines.append(f"example {p.example}: {a} and {b}, logits {p.distance:.3g} apart")
        return "\n".join(lines)

    def plot(self, file: str | PathLike[str]) -> None:
        """Draw the signal to noise of every layer into `file`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = new_figure(7, 1.2 + 0.22 * len(self.layers))
        axes: Any = figure.subplots()
        axes.plot([layer.snr for layer in self.layers], range(len(self.layers)), "o")
        axes.set_yticks(range(len(self.layers)), [layer.name for layer in self.layers])
        axes.invert_yaxis()
        axes.grid(axis="y", alpha=0.3)
        axes.set(title="Where two models part", xlabel="signal to noise of the layer's output, dB")
        figure.savefig(file)


@torch.no_grad()
def compare(
    a: nn.Module, b: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None, progress: bool = True
) -> Comparison:
    """Compare the predictions and the layers of two models of one architecture on the same data.

    Each may be float, quantized or packed. Both run in evaluation mode and are left as they were. It takes one forward
    pass over the data for each.

    Args:
        a: The reference.
        b: The model that is compared with it.
        batches: Dicts of keyword inputs with labels, or pairs `(inputs, labels)`; with `loss`, of any type.
        loss: Computes the mean loss from model and batch.
        progress: Whether to show a bar after a few seconds.

    Raises:
        ValueError: If the models have no layer in common, their logits have different shapes, or the batches are not
            what is expected.
    """
    data = LabelledBatches("compare", batches, loss)
    in_b = {name for name, module in b.named_modules() if isinstance(module, COMPARED)}
    names = [name for name, module in a.named_modules() if isinstance(module, COMPARED) and name in in_b]
    if not names:
        raise ValueError(
            f"compare: {type(a).__name__} and {type(b).__name__} have no layer of the same name; expected two models "
            "of one architecture."
        )
    sums = {name: [0.0, 0.0] for name in [*names, ""]}
    losses: tuple[list[float], list[float]] = ([], [])
    parted: list[Parted] = []
    examples, without = 0, [0, 0]
    with left_as_it_was(a), left_as_it_was(b), progress_bar(len(data), "compare", progress) as bar:
        for number in range(len(data)):
            found = []
            for model, values in zip((a, b), losses, strict=True):
                with _outputs(model, names) as outputs:
                    values.append(data.loss(model, number).item())
                found.append(outputs)
            for name, signal_noise in sums.items():
                for y_a, y_b in zip(found[0].get(name, []), found[1].get(name, []), strict=True):
                    if y_a.shape != y_b.shape:
                        raise ValueError(
                            f"compare: {name or 'the logits'}: {tuple(y_a.shape)} in the first model and "
                            f"{tuple(y_b.shape)} in the second; expected two models of one architecture."
                        )
                    signal_noise[0] += y_a.square().sum().item()
                    signal_noise[1] += (y_b - y_a).square().sum().item()
            calls = [len(outputs.get("", [])) for outputs in found]
            if calls != [1, 1]:
                raise ValueError(
                    f"compare: the loss of batch {number} called the models {calls[0]} and {calls[1]} times; expected "
                    "one call of each, whose logits are compared: a `loss` that calls the model itself, once."
                )
            (y_a,), (y_b,) = found[0][""], found[1][""]
            axis = data.class_axis(number, y_a)
            classes_a, classes_b = (y.movedim(axis, -1).flatten(0, -2) for y in (y_a, y_b))
            parted += _parted(classes_a, classes_b, examples)
            examples += len(classes_a)
            for k, scores in enumerate((classes_a, classes_b)):
                without[k] += int(scores.isnan().any(1).sum())
            bar.update()
    first = sorted(parted, key=lambda p: (None not in (p.prediction_a, p.prediction_b), -p.distance))[:PARTED]
    return Comparison(
        examples=examples,
        loss_a=data.mean(losses[0]),
        loss_b=data.mean(losses[1]),
        agreement=1 - len(parted) / examples,
        snr=decibels(*sums[""]),
        layers=tuple(LayerDifference(name, decibels(*sums[name])) for name in names if any(sums[name])),
        parted=tuple(first),
        nan_a=without[0],
        nan_b=without[1],
    )


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what layers return inside the block, on the CPU in float64, and the logits under the name ""."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str):
        def after(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001 (a forward hook)
            found.setdefault(name, []).append(
                (output if name else logits_of(output, may_be_first=True)).cpu().double()
            )

        return after

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in [*names, ""]]
    try:
        with run_as_written():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _parted(y_a: Tensor, y_b: Tensor, before: int) -> list[Parted]:
    """List where the predictions of logits `(examples, classes)` differ; `before` examples came earlier."""
    classes = [[None if k == NO_PREDICTION else k for k in predictions(y).tolist()] for y in (y_a, y_b)]
    distances = (y_b - y_a).norm(dim=1).tolist()
    rows = enumerate(zip(*classes, distances, strict=True), start=before)
    return [Parted(k, a, b, distance) for k, (a, b, distance) in rows if a != b or a is None]

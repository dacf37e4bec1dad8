"""Hold the bits that were given to each layer for a budget, what they cost and why."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from ...config import SAQQuantizationConfig
from ...tables import text_table
from ..results import Result, new_figure
from .changing import with_overrides

Unit = Literal["bops", "bytes", "ns"]
UNITS: dict[Unit, str] = {
    "bops": "bit operations of the quantized layers",
    "bytes": "bytes of the quantized weights",
    "ns": "nanoseconds of the quantized layers",
}

By = Literal["noise", "measured", "estimated"]
OBJECTIVES: dict[By, tuple[str, str]] = {
    "noise": ("noise to signal", "noise to signal of the logits, a tenth of it for weights"),
    "measured": ("measured rise", "sum of measured rises of the loss"),
    "estimated": ("estimated rise", "sum of estimated rises of the loss"),
}
"""What is added up and kept small -> its name above a column, and in full."""


@dataclass(frozen=True)
class LayerBits:
    """Holds the bits of one layer; `None` for an operand that has no quantizer.

    `chosen` names the bits that were up for choice, as fields of a configuration. `cost` is in the unit of the
    allocation, `objective` what the layer adds to that of the allocation (0 if there was no choice). `why` says what
    held the layer there.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    chosen: tuple[str, ...]
    cost: int
    objective: float
    why: str


@dataclass(frozen=True)
class Allocation(Result):
    """Holds what [`allocate_bits`] decides; `print` shows a table, `plot(file)` draws the curve.

    Attributes:
        unit: `"bops"` (bit operations for one example), `"bytes"` (packed weights) or `"ns"` (time), of the quantized
            layers.
        budget: Most that they may cost, and in `cost` what they do, in `cost_before` what they cost in the model.
        by: What was kept small, as [`allocate_bits`] takes it.
        objective: The sum of that over the layers that had a choice: noise to signal of the logits for `"noise"`,
            rises of the loss for the others. It is no loss of the model.
        layers: All quantized layers, in the order of `named_modules`.
        curve: Pairs of a budget and the smallest such sum within it.
    """

    unit: Unit
    budget: int
    cost: int
    cost_before: int
    by: By
    objective: float
    layers: tuple[LayerBits, ...]
    curve: tuple[tuple[int, float], ...]

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """Return the bits as `SAQQuantizationConfig` takes them: name of a layer -> fields."""
        return {layer.name: {f: getattr(layer, f) for f in layer.chosen} for layer in self.layers if layer.chosen}

    def applied_to(self, config: SAQQuantizationConfig) -> SAQQuantizationConfig:
        """Return a copy of `config` with these bits in its `overrides`, after those that it has: the last one wins."""
        return with_overrides(config, self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the overrides as plain data."""
        return {**super().to_dict(), "overrides": self.overrides}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "W", "A", "share of budget", OBJECTIVES[self.by][0], "why")]
        for layer in self.layers:
            bits = ["-" if b is None else str(b) for b in (layer.weight_bits, layer.activation_bits)]
            share = f"{layer.cost / self.budget:.1%}" if self.budget else "-"
            rows.append((layer.name, *bits, share, f"{layer.objective:.3g}", layer.why))
        return (
            f"{text_table(rows, right=(1, 2, 3, 4))}\n"
            f"{self.cost:,} of {self.budget:,} {self.unit} ({self.cost_before:,} before), "
            f"{OBJECTIVES[self.by][1]}: {self.objective:.4g}"
        )

    def plot(self, file: str | PathLike[str]) -> None:
        """Draw the smallest objective over the budget, and the allocation as a mark, into `file`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = new_figure(5.5, 3.4)
        axes: Any = figure.subplots()
        axes.plot(*zip(*self.curve, strict=True), marker=".", label="best for each budget")
        axes.plot([self.cost], [self.objective], "D", label="this allocation")
        axes.set(title="Bits for a budget", xlabel=UNITS[self.unit], xscale="log")
        axes.set_ylabel(OBJECTIVES[self.by][1])
        axes.legend()
        figure.savefig(file)

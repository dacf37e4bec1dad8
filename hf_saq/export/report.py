"""Say what an export holds, as a table that can be printed and as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..tables import kibibytes, text_table


@dataclass(frozen=True)
class ExportedLayer:
    """Describes one layer of an exported model.

    Attributes:
        name: Name of the module in the model.
        weight_bits: Bits of its quantizer; `None` if its weight stays in float.
        activation_bits: The same of its input.
        stored: Type of the weight in the file: `"int8"`, `"int4"` or `"float"`.
        notes: What is not plain about it.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    stored: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """Describes an exported model; `print(report)` shows a table.

    Attributes:
        file: Path of the graph inside the directory.
        size: Its bytes.
        weights: The `weights` that were asked for.
        target: The `target` that was asked for.
        layers: One entry for each quantized layer.
        exact: Whether ONNX Runtime was found to predict what the model does only with `exact=True`, which
            [`ExportedClassifier`] then does by itself.
        checks: What was verified and found, by name; empty if it was not.
    """

    file: str
    size: int
    weights: str
    target: str
    layers: tuple[ExportedLayer, ...]
    checks: dict[str, Any] = field(default_factory=dict)
    exact: bool = False

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("module", "W", "A", "stored", "note")]
        for layer in self.layers:
            bits = [str(bits or "float") for bits in (layer.weight_bits, layer.activation_bits)]
            rows.append((layer.name, *bits, layer.stored, "; ".join(layer.notes)))
        lines = [text_table(rows), f"{self.file}: {kibibytes(self.size)}, weights {self.weights}, for {self.target}"]
        lines += [f"{name}: {found}" for name, found in self.checks.items()] or ["not checked"]
        return "\n".join(lines)

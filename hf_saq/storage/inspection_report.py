"""Hold what inspection found out about a saved model, and return it as a table or JSON-plain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import SAQQuantizationConfig
from ..conversion.report import LayerPlan
from ..tables import kibibytes, text_table

_HEAD = ("module", "type", "W", "A", "weight bytes", "scales", "smallest", "largest", "note")


@dataclass(frozen=True)
class StoredLayer:
    """Describes one layer that can be quantized; bits and scales are `None` where it is in float or has none.

    Attributes:
        weight_bytes: Bytes of its weight in the file, or of the codes if it is packed.
        scales: Number of scales of its weight; `scale_min` and `scale_max` are the smallest and the largest.
    """

    name: str
    layer_type: str
    weight_bits: int | None
    activation_bits: int | None
    quantizer: str | None
    note: str
    weight_bytes: int | None
    scales: int | None
    scale_min: float | None
    scale_max: float | None

    def cells(self) -> tuple[str, ...]:
        """Write the cells of its line in the table."""
        return (
            self.name,
            self.layer_type,
            str(self.weight_bits or "float"),
            str(self.activation_bits or "float"),
            "-" if self.weight_bytes is None else f"{self.weight_bytes:,}",
            "-" if self.scales is None else str(self.scales),
            "-" if self.scale_min is None else f"{self.scale_min:.3g}",
            "-" if self.scale_max is None else f"{self.scale_max:.3g}",
            self.note,
        )


@dataclass(frozen=True)
class StoredModel:
    """Describes a saved model, as [`inspect_checkpoint`] finds it; `print` shows a table, `to_dict` is JSON-plain.

    Attributes:
        source: Directory or repository.
        architecture: Name of the model's class.
        quantization: The `quantization_config`.
        files: Name of each weight file -> its bytes.
        layers: Every layer that can be quantized.
        plans: How conversion treats these layers, in the same order.
        has_processor: Whether an image processor is stored next to the model.
        parameters: Number of parameters of the float model.
        labels: Names of the classes, in their order.
    """

    source: str
    architecture: str
    quantization: SAQQuantizationConfig
    files: dict[str, int]
    layers: tuple[StoredLayer, ...]
    plans: tuple[LayerPlan, ...]
    has_processor: bool
    parameters: int
    labels: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weight files together."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return source, architecture, configuration, bytes and layers, JSON-plain."""
        return {
            "source": self.source,
            "architecture": self.architecture,
            "quantization_config": self.quantization.to_dict(),
            "files": self.files,
            "weight_bytes": self.weight_bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        config = self.quantization
        lines = [
            f"{self.source}: {self.architecture}",
            f"storage {config.storage}, format version {config.format_version}, quantizer {config.quantizer}",
            *(f"{name}: {kibibytes(size)}" for name, size in self.files.items()),
            text_table([_HEAD, *(layer.cells() for layer in self.layers)]),
        ]
        return "\n".join(lines)

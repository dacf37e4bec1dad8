"""Hold how long each layer of an export takes with which bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...tables import text_table
from ..results import Result
from .prices import Latencies


@dataclass(frozen=True)
class LayerLatency:
    """Holds the nanoseconds of one layer for one example with one pair of bits, `None` for an operand in float.

    `form` says how the export holds the layer then; pairs of the same form share one measurement,
    and so do forms whose times cannot be told apart.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    form: str
    ns: float


@dataclass(frozen=True)
class LatencyTable(Result, Mapping[str, Latencies]):
    """Holds what [`measure_latencies`] found; `print` shows a table.

    It is what `allocate_bits(unit="ns", latencies=...)` takes: a mapping from the name of a layer to its nanoseconds
    by bits of weights and of activations.

    Attributes:
        engine, target, weights, tuned_for: What was measured, as [`measure_latencies`] was told.
        batch_size, threads, rounds: How.
        entries: Every quantized layer with every pair of bits that it has or may get.
        other_ns: Nanoseconds for one example of all nodes that belong to no quantized layer.
        attributed: Share of the time of all nodes that quantized layers took: the median over turns.
        exports: How many exports took turns.
        machine: The processor, as `hf_saq.timing` describes it, and in `versions` those of the libraries.
    """

    engine: str
    target: str
    weights: str
    tuned_for: str | None
    batch_size: int
    threads: int
    rounds: int
    entries: tuple[LayerLatency, ...]
    other_ns: float
    attributed: float
    exports: int
    machine: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LatencyTable:
        """Make the table of which `to_dict` returned `fields`: measured on one machine, used on another."""
        return cls(**{**fields, "entries": tuple(LayerLatency(**entry) for entry in fields["entries"])})

    def __getitem__(self, name: str) -> Latencies:
        found = {(e.weight_bits, e.activation_bits): e.ns for e in self.entries if e.name == name}
        if not found:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(entry.name for entry in self.entries))

    def __len__(self) -> int:
        return len({entry.name for entry in self.entries})

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "W", "A", "form", "us")]
        alike: dict[tuple[str, str], list[LayerLatency]] = {}
        for entry in self.entries:
            alike.setdefault((entry.name, entry.form), []).append(entry)
        for (name, form), entries in alike.items():
            rows.append((name, *_bits_of(entries), form, f"{entries[0].ns / 1000:.1f}"))
        return (
            f"{text_table(rows, right=(4,))}\n"
            f"{self.attributed:.0%} of the time is that of these layers, {self.other_ns / 1000:,.1f} us are not\n"
            f"{self.engine}, weights {self.weights}, for {self.target}, batch {self.batch_size}, threads "
            f"{self.threads}; {self.machine['cpu']}"
        )


def _bits_of(entries: list[LayerLatency]) -> tuple[str, str]:
    """Write the pairs of bits as two sets, or one beside the other where they are not all pairs of two sets."""
    pairs = sorted({(e.weight_bits or 0, e.activation_bits or 0) for e in entries})
    columns = [sorted({pair[side] for pair in pairs}) for side in (0, 1)]
    if len(pairs) != len(columns[0]) * len(columns[1]):
        columns = [[pair[side] for pair in pairs] for side in (0, 1)]
    weights, activations = (" ".join(str(bits or "-") for bits in column) for column in columns)
    return weights, activations

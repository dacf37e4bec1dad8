"""Write the bits of each layer for a model card, where not all layers have the same."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import SAQQuantizationConfig
from ..conversion.report import LayerPlan
from ..tables import markdown_table
from .card_sections import folded


def layer_bits(config: SAQQuantizationConfig | None, layers: Sequence[LayerPlan]) -> str:
    """Make a table of all quantized layers, to be unfolded; empty where no layer has bits of its own.

    A count by bits says enough of a model whose layers have the bits of the configuration.
    """
    own = [fields for fields in (config.overrides.values() if config is not None else ()) if _bits_in(fields)]
    converted = [layer for layer in layers if layer.settings]
    if not own or not converted:
        return ""
    rows = [[layer.name, *(_shown(layer, key) for key in ("weight_bits", "activation_bits"))] for layer in converted]
    table = markdown_table(["layer", "weight bits", "activation bits"], rows)
    return folded("Bits of each layer", table)


def _bits_in(fields: dict) -> bool:
    return not {"weight_bits", "activation_bits"}.isdisjoint(fields)


def _shown(layer: LayerPlan, key: str) -> str:
    if key not in layer.settings:
        return "-"  # the products of an attention have no weight
    return str(layer.settings[key] or "float")

"""Say what an export is for, and what that asks of its integers."""

from __future__ import annotations

import warnings
from typing import Any

from .passes import saturating_layers, split_saturating_layers

TARGETS = {
    "cpu": "any CPU: products that would saturate without VNNI are split in two halves, which is exact",
    "cpu-vnni": "CPUs that sum products in 32 bits: x86 with VNNI, ARM with dot products",
    "gpu": "GPUs and other accelerators, which sum products in 32 bits",
}


def fit_to_target(graph_model: Any, target: str) -> list[str]:
    """Keep the products of a graph exact on `target`, in place.

    Warns of layers that another target would compute wrongly, with their names.

    Returns:
        Names of the layers that were split.
    """
    split = split_saturating_layers(graph_model) if target == "cpu" else []
    unsafe = saturating_layers(graph_model)
    if unsafe:
        cure = (
            "Give them fewer bits (first_last_bits=7, or overrides), or leave them in float."
            if target == "cpu"
            else "Export with target='cpu' for such CPUs."
        )
        warnings.warn(
            f"export for {target!r}: {len(unsafe)} layers multiply weights of 8 bits with inputs of 8 bits, which "
            f"CPUs without VNNI get wrong without a word: {', '.join(unsafe)}. {cure}",
            stacklevel=3,
        )
    return split


def check_target(target: str) -> None:
    """Raise `ValueError` if there is no such target."""
    if target not in TARGETS:
        listed = "; ".join(f"{name!r} ({meaning})" for name, meaning in TARGETS.items())
        raise ValueError(f"target={target!r}; expected one of {listed}.")

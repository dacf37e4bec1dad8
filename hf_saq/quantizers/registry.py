"""Quantizers by name. A new quantizer is one file and one line here."""

from __future__ import annotations

from .base import Quantizer
from .lsq import LSQQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQQuantizer,
}


def quantizer_class(name: str) -> type[Quantizer]:
    """The class registered as `name`. Raises `ValueError` with the known names otherwise."""
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer={name!r} is unknown; expected one of {sorted(QUANTIZERS)}.")
    return QUANTIZERS[name]

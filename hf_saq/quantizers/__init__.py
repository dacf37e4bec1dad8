"""Uniform quantizers: float tensors onto learned integer grids."""

from .base import MAX_BITS, MIN_BITS, Observer, Quantizer, round_straight_through
from .lsq import LSQQuantizer, lsq_fake_quantize
from .registry import QUANTIZERS, quantizer_class

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "QUANTIZERS",
    "LSQQuantizer",
    "Observer",
    "Quantizer",
    "lsq_fake_quantize",
    "quantizer_class",
    "round_straight_through",
]

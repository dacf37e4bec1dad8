"""What training takes from `hf_saq.analysis`: bits for a budget before it begins, sharpness while it runs."""

from .giving_bits import GivesBits
from .measured_sharpness import MeasuresSharpness

__all__ = ["GivesBits", "MeasuresSharpness"]

"""What training takes from `hf_saq.analysis`: bits for a budget before it begins, sharpness while it runs."""

from .giving_bits import GivesBits

__all__ = ["GivesBits"]

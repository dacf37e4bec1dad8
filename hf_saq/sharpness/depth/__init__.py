"""Perturb the last layers of a model alone, and run those before them once for both passes of a step."""

from .late_layers import LateLayers, find_late_layers
from .shared_prefix import SharedPrefix
from .trial import choose_late_layers

__all__ = ["LateLayers", "SharedPrefix", "choose_late_layers", "find_late_layers"]

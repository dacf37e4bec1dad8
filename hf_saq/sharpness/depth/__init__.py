"""Perturb the last layers of a model alone, and run those before them once for both passes of a step."""

from .late_layers import LateLayers, find_late_layers
from .shared_prefix import SharedPrefix
from .trial import reason_of_a_trial

__all__ = ["LateLayers", "SharedPrefix", "find_late_layers", "reason_of_a_trial"]

"""Take the second pass of sharpness-aware training. The three cases and their equations are in `three_cases.py`.

In the first pass `seam.py` catches the gradients at the quantized weights. `three_cases.py` turns them into `eps`,
which `displacement.py` and the seam add for the second pass; `frozen_batch_norm.py`, `buffer_state.py` and
`random_state.py` make sure that this pass differs from the first in nothing else. `minimizer.py` holds these parts
together; `schedules/` decides when to take them.

Comes in: a model with quantized layers, and backward passes. Goes out: gradients at the perturbed point, in `p.grad`.
Must not know: transformers, configurations, files, what a layer computes.
"""

from .default_radius import default_rho
from .displacement import Displacement
from .frozen_batch_norm import frozen_norm_statistics
from .minimizer import SharpnessAwareMinimizer
from .parameter_gradients import set_aside
from .perturbed_tensors import PerturbedTensors, QuantizedWeight, kinds_of_parameters, quantized_weights
from .random_state import RNGState
from .three_cases import Case

__all__ = [
    "Case",
    "Displacement",
    "PerturbedTensors",
    "QuantizedWeight",
    "RNGState",
    "SharpnessAwareMinimizer",
    "default_rho",
    "frozen_norm_statistics",
    "kinds_of_parameters",
    "quantized_weights",
    "set_aside",
]

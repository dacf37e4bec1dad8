"""Find how many bits each layer needs, and give bits where they matter.

`candidates.py` lets one operand have other bits for a moment, `estimates.py` predicts what that does to the loss, and
`layer_sensitivity.py` measures it. `allocation.py` turns this into bits for a budget,
by an `integer_program.py` over options with `prices.py`; `allocated.py` holds what came out, and
`changing.py` gives it to a model. `measured_latency.py` fills a `latency_table.py` with the prices of an export, by
the forms in `export_forms.py` and without the `noise.py`; it loads what exports, so this package does not import it.
"""

from .allocated import Allocation, LayerBits
from .allocation import allocate_bits
from .changing import change_bits
from .layer_sensitivity import OperandSensitivity, Sensitivity, sensitivity

__all__ = [
    "Allocation",
    "LayerBits",
    "OperandSensitivity",
    "Sensitivity",
    "allocate_bits",
    "change_bits",
    "sensitivity",
]

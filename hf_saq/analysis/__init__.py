"""Look at models: what one costs to run and to store, how sharp its minimum is, and which layers suffer.

Comes in: any model, float, quantized or packed, and inputs for it, with labels where a loss is asked for. Goes out:
plain values that print as tables, become JSON and draw themselves; the model is left as it was. Must not know: how the
model was trained, the Hub, the command line.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .bits import Allocation, LayerBits, OperandSensitivity, Sensitivity, allocate_bits, sensitivity
    from .bits.latency_table import LatencyTable, LayerLatency
    from .bits.measured_latency import measure_latencies
    from .comparison import Comparison, LayerDifference, compare
    from .costs import Cost, LayerCost, cost
    from .loss_landscape import Landscape, Surface, landscape
    from .oscillation import OscillationCounter
    from .sharpness_at_quantized import Rise, Sharpness, sharpness

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "comparison": ("Comparison", "LayerDifference", "compare"),
        "bits": (
            "Allocation",
            "LayerBits",
            "OperandSensitivity",
            "Sensitivity",
            "allocate_bits",
            "sensitivity",
        ),
        "bits.latency_table": ("LatencyTable", "LayerLatency"),
        "bits.measured_latency": ("measure_latencies",),
        "costs": ("Cost", "LayerCost", "cost"),
        "loss_landscape": ("Landscape", "Surface", "landscape"),
        "oscillation": ("OscillationCounter",),
        "sharpness_at_quantized": ("Rise", "Sharpness", "sharpness"),
    },
)

__all__ = [
    "Allocation",
    "Comparison",
    "Cost",
    "Landscape",
    "LatencyTable",
    "LayerBits",
    "LayerCost",
    "LayerDifference",
    "LayerLatency",
    "OperandSensitivity",
    "OscillationCounter",
    "Rise",
    "Sensitivity",
    "Sharpness",
    "Surface",
    "allocate_bits",
    "compare",
    "cost",
    "landscape",
    "measure_latencies",
    "sensitivity",
    "sharpness",
]

"""Measure models: count what one costs to run and to store.

Comes in: any model, float, quantized or packed, and inputs for it. Goes out: plain values that print as tables; the
model is left as it was. Must not know: how the model was trained, the Hub, the command line.
"""

from .cost import Cost, LayerCost, cost

__all__ = ["Cost", "LayerCost", "cost"]

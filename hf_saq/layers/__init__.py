"""Define layers on quantized operands, and which float layer each one stands in for.

Comes in: a float layer and its quantizers. Goes out: a layer that trains on quantized weights and inputs, one that
runs from packed integers, and the float layer again. Must not know: whole models, configurations, files, and that
sharpness is minimised.

`registry` says which layers there are; `quantized` is what they have in common, `linear`, `conv` and `attention` are
the layers; `packed` runs from the bytes of `packing`; `float_form` remembers what a layer was; `recompute` saves the
memory of quantized inputs; `tracing` is for `torch.fx`, `as_written` keeps compiled code out for a while.
"""

from .attention import QuantAttentionProducts
from .conv import QuantConv1d, QuantConv2d, QuantConv2dSame
from .linear import QuantLinear, QuantTransposedLinear
from .packed import PackedLayer
from .quantized import HoldsQuantizers, QuantizedLayer
from .registry import LIBRARY_LAYERS, QUANTIZED_LAYERS, quantized_form

__all__ = [
    "LIBRARY_LAYERS",
    "QUANTIZED_LAYERS",
    "HoldsQuantizers",
    "PackedLayer",
    "QuantAttentionProducts",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv2dSame",
    "QuantLinear",
    "QuantTransposedLinear",
    "QuantizedLayer",
    "quantized_form",
]

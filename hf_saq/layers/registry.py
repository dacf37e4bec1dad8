"""List which quantized layer stands in for each float layer. A new layer type is one file and one line here."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .conv import QuantConv1d, QuantConv2d, QuantConv2dSame
from .linear import QuantLinear, QuantTransposedLinear
from .quantized import QuantizedLayer

QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}
"""Exact types of torch."""

LIBRARY_LAYERS: dict[str, type[QuantizedLayer]] = {
    "timm.layers.conv2d_same.Conv2dSame": QuantConv2dSame,
    "timm.layers.linear.Linear": QuantLinear,
    "transformers.pytorch_utils.Conv1D": QuantTransposedLinear,
}
"""Exact types of libraries that this package does not import here, by their qualified names."""

_CHANGES_NO_RESULT = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__constants__"} | {
    "__firstlineno__",
    "__static_attributes__",
    "__parameters__",
    "reset_parameters",
    "extra_repr",
}


def quantized_form(layer: nn.Module) -> type[QuantizedLayer] | None:
    """Find the class that stands in for `layer`, or `None`.

    A subclass of a torch layer counts as that layer if all it adds is a constructor; any other may compute something
    else.
    """
    kind = type(layer)
    found = QUANTIZED_LAYERS.get(kind) or LIBRARY_LAYERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if found is not None or kind is NonDynamicallyQuantizableLinear:
        return found
    for float_type, quantized in QUANTIZED_LAYERS.items():
        if isinstance(layer, float_type) and not list(layer.children()):
            between = kind.__mro__[: kind.__mro__.index(float_type)]
            own = {name for base in between for name in vars(base)} - _CHANGES_NO_RESULT
            if not own and set(layer._parameters) == {"weight", "bias"} and not layer._buffers:
                return quantized
    return None

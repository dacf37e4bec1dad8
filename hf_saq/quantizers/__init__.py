"""Quantize float tensors onto learned, uniform integer grids.

Comes in: float tensors and a `QuantizerSettings`. Goes out: the nearest grid values, differentiable in the tensor and
in the learned values; integer codes; `value = code * scale + offset`. Must not know: layers, models, configurations,
files, and that sharpness is minimised.

`settings`, `contract` and `range_state` say what a quantizer is; `methods/` holds the quantizers of the literature and
`registry` their names; `affine` is the differentiable function and has the gradient of a scale, `kernels/` its
arithmetic; `straight_through`, `statistics` and `scale_search` are what a quantizer is built from.
"""

from .affine import affine_fake_quantize
from .contract import Observer, Quantizer
from .kernels import set_backend
from .methods import (
    DoReFaQuantizer,
    LIQQuantizer,
    LSQPlusQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    lsq_fake_quantize,
)
from .precision import in_double, where_double_is
from .registry import QUANTIZERS, check_activation_mode, quantizer_class
from .scale_search import mse_range, mse_scale
from .settings import MAX_BITS, MIN_BITS, QuantizerSettings, check_bits
from .statistics import mean_and_std, shared_dimensions
from .straight_through import SCALE_FLOOR, positive, round_straight_through

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "QUANTIZERS",
    "SCALE_FLOOR",
    "DoReFaQuantizer",
    "LIQQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "Observer",
    "PACTQuantizer",
    "Quantizer",
    "QuantizerSettings",
    "affine_fake_quantize",
    "check_activation_mode",
    "check_bits",
    "in_double",
    "lsq_fake_quantize",
    "mean_and_std",
    "mse_range",
    "mse_scale",
    "positive",
    "quantizer_class",
    "round_straight_through",
    "set_backend",
    "shared_dimensions",
    "where_double_is",
]

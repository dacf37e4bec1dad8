"""Uniform quantizers: float tensors onto learned integer grids."""

from .affine import affine_fake_quantize
from .contract import MAX_BITS, MIN_BITS, Observer, Quantizer, positive, round_straight_through
from .dorefa import DoReFaQuantizer
from .kernels import set_backend
from .liq import LIQQuantizer
from .lsq import LSQQuantizer, lsq_fake_quantize
from .lsq_plus import LSQPlusQuantizer
from .pact import PACTQuantizer
from .registry import QUANTIZERS, check_activation_mode, quantizer_class
from .scale_search import mse_scale

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "QUANTIZERS",
    "DoReFaQuantizer",
    "LIQQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "Observer",
    "PACTQuantizer",
    "Quantizer",
    "affine_fake_quantize",
    "check_activation_mode",
    "lsq_fake_quantize",
    "mse_scale",
    "positive",
    "quantizer_class",
    "round_straight_through",
    "set_backend",
]

"""Define the quantizers of the literature, one file each: LSQ, LSQ+, LIQ, PACT and DoReFa."""

from .dorefa import DoReFaQuantizer
from .liq import LIQQuantizer
from .lsq import LSQQuantizer, lsq_fake_quantize
from .lsq_plus import LSQPlusQuantizer
from .pact import PACTQuantizer

__all__ = [
    "DoReFaQuantizer",
    "LIQQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "PACTQuantizer",
    "lsq_fake_quantize",
]

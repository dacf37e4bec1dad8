"""Train, store and run Hugging Face vision models with Sharpness-Aware Quantization (arXiv:2111.12273).

Importing the package makes `from_pretrained` read and write quantized checkpoints (`quant_method="saq"`). It is quick:
torch and transformers are imported only when something that needs them is used.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_exports
from .registration import register_when_loaded
from .version import __version__

if TYPE_CHECKING:
    from .analysis import Cost, cost
    from .config import SAQConfig, SAQQuantizationConfig
    from .conversion import (
        calibrate,
        correct_biases,
        dequantize,
        keep_decoded,
        pack,
        quantize,
        reestimate_batch_norm,
        unpack,
    )
    from .sharpness import SharpnessAwareMinimizer
    from .training import SAQTrainer, parameter_groups

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "analysis": ("Cost", "cost"),
        "config": ("SAQConfig", "SAQQuantizationConfig"),
        "conversion": (
            "calibrate",
            "correct_biases",
            "dequantize",
            "keep_decoded",
            "pack",
            "quantize",
            "reestimate_batch_norm",
            "unpack",
        ),
        "sharpness": ("SharpnessAwareMinimizer",),
        "training": ("SAQTrainer", "parameter_groups"),
    },
    modules=(
        "analysis",
        "cli",
        "config",
        "conversion",
        "data",
        "export",
        "hub",
        "layers",
        "quantizers",
        "sharpness",
        "storage",
        "timing",
        "training",
    ),
)

register_when_loaded()

__all__ = [
    "Cost",
    "SAQConfig",
    "SAQQuantizationConfig",
    "SAQTrainer",
    "SharpnessAwareMinimizer",
    "__version__",
    "calibrate",
    "correct_biases",
    "cost",
    "dequantize",
    "keep_decoded",
    "pack",
    "parameter_groups",
    "quantize",
    "reestimate_batch_norm",
    "unpack",
]

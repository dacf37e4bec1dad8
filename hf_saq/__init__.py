"""Sharpness-Aware Quantization (arXiv:2111.12273) for Hugging Face vision models.

Importing the package registers `quant_method="saq"` with transformers, so that `from_pretrained` reads and writes
quantized checkpoints.
"""

from .analysis.cost import Cost, cost
from .config import SAQConfig, SAQQuantizationConfig
from .conversion.bias_correction import correct_biases
from .conversion.calibration import calibrate
from .conversion.forms import dequantize, pack, unpack
from .conversion.swapping import quantize
from .sharpness.minimizer import SharpnessAwareMinimizer
from .storage.from_pretrained import register
from .training.trainer import SAQTrainer
from .version import __version__

register()

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
    "pack",
    "quantize",
    "unpack",
]

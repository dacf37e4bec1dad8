"""Sharpness-Aware Quantization (arXiv:2111.12273) for Hugging Face vision models.

Importing the package registers `quant_method="saq"` with transformers, so that `from_pretrained` reads and writes
quantized checkpoints.
"""

from .bias_correction import correct_biases
from .calibration import calibrate
from .config import SAQConfig, SAQQuantizationConfig
from .conversion import quantize
from .cost import Cost, cost
from .hf_quantizer import register
from .packed_model import dequantize, pack, unpack
from .perturbation import SharpnessAwareMinimizer
from .trainer import SAQTrainer
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

"""Hold the two configurations that users write: how to quantize, and how to train sharpness-aware.

Comes in: keyword arguments, `config.json`, command lines. Goes out: checked, JSON-plain values that stay as they were
given. Must not know: layers, files; of models only where one of transformers keeps its configuration.
"""

from .quantization import EXPORT_RECORD, FORMAT_VERSION, OVERRIDABLE, QUANT_METHOD, SAQQuantizationConfig
from .training import SAQConfig

__all__ = ["EXPORT_RECORD", "FORMAT_VERSION", "OVERRIDABLE", "QUANT_METHOD", "SAQConfig", "SAQQuantizationConfig"]

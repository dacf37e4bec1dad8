"""Change the form of a whole model: float to quantized, calibrated, packed, and back.

Comes in: any `nn.Module` and a `SAQQuantizationConfig`; batches to calibrate with. Goes out: the model with quantized
or packed layers in the place of its own, and a report of what happened to each. Must not know: files, checkpoints,
training. Of transformers it imports the attention interface alone.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from . import attention_interface
    from .batch_norm_statistics import norms_with_statistics, reestimate_batch_norm
    from .bias_correction import correct_biases
    from .calibration import calibrate, is_calibrated, needs_calibration
    from .decoding import keep_decoded
    from .first_scales import initialize_weight_quantizers
    from .forms import (
        check_has_values,
        convert_to_packed,
        copy_with,
        dequantize,
        dequantize_in_place,
        forget_export,
        is_packed,
        pack,
        refuse_uncalibrated,
        unpack,
    )
    from .planning import configuration_of
    from .report import ConversionReport, LayerPlan, float_parameters, note_signs
    from .swapping import (
        as_decided,
        convert,
        leave_in_float,
        leave_layer_in_float,
        note_left_in_float,
        note_replaced_layers,
        quantize,
        replace_modules,
    )

# Lazy, because `attention_interface` needs models of transformers, and `storage.from_pretrained` is imported earlier.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "batch_norm_statistics": ("norms_with_statistics", "reestimate_batch_norm"),
        "bias_correction": ("correct_biases",),
        "calibration": ("calibrate", "is_calibrated", "needs_calibration"),
        "decoding": ("keep_decoded",),
        "first_scales": ("initialize_weight_quantizers",),
        "forms": (
            "check_has_values",
            "convert_to_packed",
            "copy_with",
            "dequantize",
            "dequantize_in_place",
            "forget_export",
            "is_packed",
            "pack",
            "refuse_uncalibrated",
            "unpack",
        ),
        "planning": ("configuration_of",),
        "report": ("ConversionReport", "LayerPlan", "float_parameters", "note_signs"),
        "swapping": (
            "as_decided",
            "convert",
            "leave_in_float",
            "leave_layer_in_float",
            "note_left_in_float",
            "note_replaced_layers",
            "quantize",
            "replace_modules",
        ),
    },
    modules=("attention_interface",),
)

__all__ = [
    "ConversionReport",
    "LayerPlan",
    "as_decided",
    "attention_interface",
    "calibrate",
    "check_has_values",
    "configuration_of",
    "convert",
    "convert_to_packed",
    "copy_with",
    "correct_biases",
    "dequantize",
    "dequantize_in_place",
    "float_parameters",
    "forget_export",
    "initialize_weight_quantizers",
    "is_calibrated",
    "is_packed",
    "keep_decoded",
    "leave_in_float",
    "leave_layer_in_float",
    "needs_calibration",
    "norms_with_statistics",
    "note_left_in_float",
    "note_replaced_layers",
    "note_signs",
    "pack",
    "quantize",
    "reestimate_batch_norm",
    "refuse_uncalibrated",
    "replace_modules",
    "unpack",
]

"""Change graphs so that engines find the patterns they run in integers; each pass says when it changes no result."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .batch_norms import fold_batch_norms
from .codes import narrow_codes, widen_codes
from .masks import drop_open_masks
from .matmuls import gemms_to_matmuls, keep_inputs_in_float, subtract_biases_before_gelus, transpose_stored_weights
from .pads import move_pads_behind_codes
from .relus import fold_relus_into_codes
from .saturation import may_saturate, saturating_layers, split_saturating_layers
from .sizes import forget_names, forget_shapes
from .windows import convolutions_to_products

__all__ = [
    "convolutions_to_products",
    "drop_open_masks",
    "fold_batch_norms",
    "fold_relus_into_codes",
    "forget_names",
    "forget_shapes",
    "gemms_to_matmuls",
    "keep_inputs_in_float",
    "may_saturate",
    "move_pads_behind_codes",
    "narrow_codes",
    "run_in_integers",
    "saturating_layers",
    "split_saturating_layers",
    "store",
    "subtract_biases_before_gelus",
    "transpose_stored_weights",
    "widen_codes",
]


def run_in_integers(model: Any) -> dict[str, str]:
    """Bring the layers of an `onnx_ir.Model`, in place, into the forms that engines run in integers.

    Returns:
        What [`fold_batch_norms`] returns.
    """
    transpose_stored_weights(model)
    gemms_to_matmuls(model)
    subtract_biases_before_gelus(model)
    folded = fold_batch_norms(model)
    move_pads_behind_codes(model)
    fold_relus_into_codes(model)
    drop_open_masks(model)
    convolutions_to_products(model, patches_only=True)
    return folded


def store(model: Any, weights: str) -> None:
    """Choose the types of codes, in place, and drop what a graph can be run without.

    Args:
        weights: `"int4"` stores codes of at most 4 bits as such.
    """
    if weights == "int4":
        narrow_codes(model)
    keep_inputs_in_float(model)
    common = import_module("onnx_ir.passes.common")
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    forget_shapes(model)
    forget_names(model)

"""Change graphs so that engines find the patterns they run in integers; each pass says when it changes no result."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .batch_norms import fold_batch_norms
from .codes import narrow_codes, widen_codes
from .matmuls import gemms_to_matmuls, transpose_stored_weights
from .pads import move_pads_behind_codes
from .relus import fold_relus_into_codes
from .sizes import forget_shapes

__all__ = [
    "fold_batch_norms",
    "fold_relus_into_codes",
    "forget_shapes",
    "gemms_to_matmuls",
    "move_pads_behind_codes",
    "narrow_codes",
    "shipped_graph",
    "transpose_stored_weights",
    "widen_codes",
]


def shipped_graph(model: Any, weights: str) -> dict[str, str]:
    """Run all passes on an `onnx_ir.Model`, in place.

    Args:
        weights: `"int4"` stores codes of at most 4 bits as such.

    Returns:
        What [`fold_batch_norms`] returns.
    """
    common = import_module("onnx_ir.passes.common")
    transpose_stored_weights(model)
    gemms_to_matmuls(model)
    folded = fold_batch_norms(model)
    move_pads_behind_codes(model)
    fold_relus_into_codes(model)
    narrow_codes(model) if weights == "int4" else widen_codes(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    forget_shapes(model)
    return folded

"""Trace a model of integer layers into an ONNX graph."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .extras import needed
from .integer_copy import LogitsOnly
from .operators import OPSET, translation_table

OUTPUT = "logits"
PREFIX = "model."
"""What stands before the names of a model's tensors in the graph: they are those of `LogitsOnly`."""


def trace(model: nn.Module, example: Tensor) -> Any:
    """Write `model` as an `onnx_ir.Model`: a graph from inputs with a dynamic batch dimension to logits.

    Args:
        model: A model of integer layers, in evaluation mode.
        example: Inputs `(batch, ...)`; all dimensions but the first become those of the graph.
    """
    needed("onnx"), needed("onnxscript")
    two = torch.cat([example, example])[:2]  # with a batch of one it would be taken for a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own future
        program = torch.onnx.export(
            LogitsOnly(model).eval(),
            (two,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[getattr(model, "main_input_name", "pixel_values")],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=translation_table(),
            verbose=False,
        )
    assert program is not None
    return _with_names_of(program.model)


def _with_names_of(graph_model: Any) -> Any:
    """Call the tensors of the graph as the model does."""
    initializers = graph_model.graph.initializers
    for value in list(initializers.values()):
        if value.name.startswith(PREFIX):
            value.name = value.name.removeprefix(PREFIX)
    return graph_model

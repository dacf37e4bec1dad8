"""Trace a model of integer layers into an ONNX graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..outputs import logits_of
from .extras import in_one_line, needed
from .integer_copy import LogitsOnly
from .operators import OPSET, translation_table

OUTPUT = "logits"
PREFIX = "model."
"""What stands before the names of a model's tensors in the graph: they are those of `LogitsOnly`."""
PREDICTED = "pred_"
"""How transformers begins the names of what detectors predict besides classes: boxes, masks."""


def trace(model: nn.Module, example: Tensor) -> Any:
    """Write `model` as an `onnx_ir.Model`: a graph from inputs with a dynamic batch dimension to logits.

    Args:
        model: A model of integer layers, in evaluation mode.
        example: Inputs `(batch, ...)`; all dimensions but the first become those of the graph.

    Raises:
        ValueError: If the model does not run on the example, predicts more than logits, cannot be traced, or takes one
            batch size only.
    """
    needed("onnx"), needed("onnxscript")
    two = torch.cat([example, example])[:2]  # with a batch of one it would be taken for a constant
    whole, name = LogitsOnly(model).eval(), type(model).__name__
    with torch.no_grad():
        try:
            answer = whole.model(two)
        except Exception as error:
            raise ValueError(
                f"{name} does not run on inputs of shape {tuple(two.shape)}: {in_one_line(error)} Pass the "
                "image_size that it takes, or example=, a batch of its inputs."
            ) from error
    _check_is_classifier(name, answer)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own future
        try:
            program = torch.onnx.export(
                whole,
                (two,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[getattr(model, "main_input_name", "pixel_values")],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=translation_table(),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(
                f"{name} cannot be traced: {in_one_line(_first_of(error))} What its forward computes must not depend "
                "on values, and operators of its own must be known to torch.onnx."
            ) from error
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        raise ValueError(
            f"{name} was traced for batches of {len(two)} only: its forward makes a number of the size of its batch, "
            "as int(x.shape[0]) does. Use x.shape[0] as it is, or -1 in a reshape."
        )
    return _with_names_of(program.model)


def _check_is_classifier(name: str, answer: Any) -> None:
    """Raise `ValueError` if logits are not all that a model predicts: the graph would answer without the rest."""
    try:
        logits_of(answer)
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error
    others = [key for key in answer if key.startswith(PREDICTED)] if isinstance(answer, Mapping) else []
    if others:
        raise ValueError(
            f"{name} cannot be exported: besides logits it predicts {', '.join(others)}, which a graph that gives "
            "logits alone would be without; expected a classifier."
        )


def _first_of(error: BaseException) -> BaseException:
    """Return what went wrong first, of errors that were raised from each other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_names_of(graph_model: Any) -> Any:
    """Call the tensors of the graph as the model does."""
    initializers = graph_model.graph.initializers
    for value in list(initializers.values()):
        if value.name.startswith(PREFIX):
            value.name = value.name.removeprefix(PREFIX)
    return graph_model

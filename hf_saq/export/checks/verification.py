"""Verify an export before it is written: what is stored, each layer alone, and the model as a whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import HoldsQuantizers, PackedLayer, QuantizedLayer
from ...progress import with_progress
from ...quantizers import Quantizer
from ..extras import needed
from ..integer_layers import IntegerLayer
from ..passes.nodes import constant, nodes_of
from .layers_alone import record, wrong_layers
from .sessions import AS_IT_IS, ENGINES, integer_layers
from .spans import LayerSpan, find_span
from .stored_values import wrong_activation, wrong_weight
from .whole_model import agreement, own_logits

LARGEST_BATCH = 4
"""Inputs that layers are run on alone."""
LISTED = 5


class ExportCheckError(ValueError):
    """Says which checks of an export failed. Nothing was written."""


def verify(
    model: nn.Module,
    copied: nn.Module,
    content: bytes,
    folded: dict[str, str],
    example: Tensor,
    engines: Sequence[str],
) -> dict[str, Any]:
    """Verify the graph `content` of `model`.

    Args:
        model: The quantized model.
        copied: Its integer copy, which names the layers.
        content: The graph as it will be written.
        folded: Name of a layer -> name of the module whose normalization its weight now contains.
        example: Inputs `(batch, ...)`.
        engines: Keys of `ENGINES`, the libraries to verify it with.

    Returns:
        What was found, by the name of the check, for people to read.

    Raises:
        ExportCheckError: If a check fails; says which, and of which layers.
    """
    graph_model = needed("onnx_ir").from_proto(needed("onnx").load_from_string(content))
    layers: dict[str, Any] = {
        name: model.get_submodule(name)
        for name, layer in copied.named_modules()
        if isinstance(layer, IntegerLayer) and layer.grid is not None
    }
    spans = {name: find_span(graph_model, name, _is_affine(layer)) for name, layer in layers.items()}
    found: dict[str, Any] = {}
    _refuse("codes and scales are not those of the model", _wrong_values(model, graph_model, layers, spans, folded))
    found["codes and scales"] = f"equal in {len(layers)} layers"
    used = {name: span for name, span in spans.items() if span is not None}
    single = nn.Module.to(copy.deepcopy(model), device="cpu", dtype=torch.float32).eval()
    norms = {name: single.get_submodule(folded[name]) if name in folded else None for name in used}
    recorded = record(single, norms, example[:LARGEST_BATCH])
    logits, own_noise = own_logits(model, example)
    name_of_input = graph_model.graph.inputs[0].name
    for engine in with_progress([run for library in engines for run in ENGINES[library]], "verifying on engines"):
        causes = (_CAUSE_OF_LAYER, _CAUSE_OF_MODEL) if engine == AS_IT_IS else (_CAUSE_OF_ENGINE.format(engine),) * 2
        _refuse(causes[0], wrong_layers(graph_model, used, recorded, engine))
        result = agreement(content, logits, own_noise, example, name_of_input, engine)
        _refuse(causes[1], {} if result.holds else {"the model": str(result)})
        found[engine] = f"{len(recorded)} layers alone within one step; {result}"
    if "onnxruntime" in engines:
        found["integers"] = f"{integer_layers(content)} of {len(layers)} layers run in integers in ONNX Runtime"
    return found


_CAUSE_OF_LAYER = "layers do not compute what the model's do"
_CAUSE_OF_ENGINE = (
    "{} computes something else once it optimizes the graph: its integer products saturate on this CPU "
    "(choose target='cpu', or fewer bits for weights or inputs), or it fuses nodes unfaithfully"
)
_CAUSE_OF_MODEL = (
    "the graph does not predict what the model predicts although its layers are right: something between them is not "
    "traced faithfully (control flow that depends on values, for example)"
)


def _refuse(cause: str, wrong: dict[str, str]) -> None:
    if wrong:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(wrong.items())[:LISTED])
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ExportCheckError(f"export not written, {cause}. {listed}{more}.")


def _wrong_values(
    model: nn.Module,
    graph_model: Any,
    layers: dict[str, QuantizedLayer | PackedLayer],
    spans: dict[str, LayerSpan | None],
    folded: dict[str, str],
) -> dict[str, str]:
    wrong = {}
    for name, layer in layers.items():
        span = spans[name]
        if span is None:
            wrong[name] = (
                "its codes are not in the graph: the model does not use them, or another layer's are the same"
            )
            continue
        norm = model.get_submodule(folded[name]) if name in folded else None
        reason = wrong_weight(layer, span, norm)
        quantizer: Any = layer.activation_quantizer
        if not reason and (quantizer is None) != (span.quantize is None):
            reason = "its input is quantized in one of model and graph only"
        if not reason and quantizer is not None:
            reason = wrong_activation(quantizer, span.quantize, span.clip)
        if reason:
            wrong[name] = reason
    missing = _missing_products(model, graph_model)
    return {**wrong, **missing}


def _missing_products(model: nn.Module, graph_model: Any) -> dict[str, str]:
    """Name the quantizers of attention products whose scale no node of the graph quantizes with."""
    scales = [constant(node.inputs[1]) for node in nodes_of(graph_model, "QuantizeLinear")]
    known = {float(scale) for scale in scales if scale is not None and scale.shape == ()}
    wrong = {}
    for module in model.modules():
        if isinstance(module, HoldsQuantizers) and not isinstance(module, QuantizedLayer):
            for quantizer in module.own_quantizers():
                scale = float(quantizer.grid()[0].reshape(()).float())
                if scale not in known:
                    wrong[quantizer.path] = f"its scale {scale:.6g} is not in the graph"
    return wrong


def _is_affine(layer: QuantizedLayer | PackedLayer) -> bool:
    quantizer = layer.activation_quantizer
    return isinstance(quantizer, Quantizer) and quantizer.has_offset

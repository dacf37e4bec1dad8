"""Verify an export before it is written: what is stored, each layer alone, and the model as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import HoldsQuantizers, PackedLayer, QuantizedLayer
from ...progress import with_progress
from ...quantizers import Quantizer
from ..extras import needed
from ..integer_layers import IntegerLayer
from ..passes.nodes import constant, nodes_of
from ..stored_grids import ActivationGrid
from .layers_alone import record, wrong_layers
from .refusing import refuse
from .sessions import AS_IT_IS, EXACT, ROUNDED, VERIFIED_BY, integer_layers
from .spans import LayerSpan, find_span
from .stored_values import wrong_activation, wrong_weight
from .whole_model import Agreement, agreement, logits_in_float32, own_logits

LARGEST_BATCH = 4
"""Inputs that layers are run on alone."""
BATCHES = (5, 3)
"""Sizes of which one is tried besides that of the example. Graphs are traced with two inputs."""
FAR = 0.02
"""Beyond this share of the logits it is seen whether rounded biases are what moves them: then one image in five of a
trained MobileNetV2 with 4 bits had another class (docs/engine_accuracy.md)."""


@dataclass(frozen=True)
class Verification:
    """Says what was found.

    Attributes:
        found: By the name of the check, for people to read.
        exact: Whether ONNX Runtime predicts what the model does only if it leaves biases of convolutions in float.
        rounded: How far its logits are if it does not; empty if `exact` is `False`.
    """

    found: dict[str, Any]
    exact: bool = False
    rounded: str = ""


@dataclass(frozen=True)
class _Seen:
    """Holds what one engine computed: layers that are wrong, and the whole model."""

    layers: dict[str, str]
    whole: Agreement

    @property
    def holds(self) -> bool:
        return not self.layers and self.whole.holds


def verify(
    model: nn.Module,
    copied: nn.Module,
    content: bytes,
    folded: dict[str, str],
    example: Tensor,
    engines: Sequence[str],
) -> Verification:
    """Verify the graph `content` of `model`.

    Args:
        model: The quantized model.
        copied: Its integer copy, which names the layers.
        content: The graph as it will be written.
        folded: Name of a layer -> name of the module whose normalization its weight now contains.
        example: Inputs `(batch, ...)`.
        engines: Keys of `VERIFIED_BY`, the libraries to verify it with.

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
    refuse("codes and scales are not those of the model", _wrong_values(model, graph_model, layers, spans, folded))
    found: dict[str, Any] = {"codes and scales": f"equal in {len(layers)} layers"}
    used = {name: span for name, span in spans.items() if span is not None}
    single = nn.Module.to(copy.deepcopy(model), device="cpu", dtype=torch.float32).eval()
    norms = {name: single.get_submodule(folded[name]) if name in folded else None for name in used}
    recorded = record(single, norms, example[:LARGEST_BATCH])
    own = own_logits(model, example)
    name_of_input = graph_model.graph.inputs[0].name

    def seen(engine: str) -> _Seen:
        noise = own.rounding if engine == AS_IT_IS else own.noise
        whole = agreement(content, own.logits, noise, example, name_of_input, engine)
        return _Seen(wrong_layers(graph_model, used, recorded, engine), whole)

    rounded = ""
    for engine in with_progress([run for library in engines for run in VERIFIED_BY[library]], "verifying on engines"):
        result = seen(engine)
        if engine == ROUNDED and (exactly := _better_exactly(result, seen)) is not None:
            rounded, engine, result = str(result.whole), EXACT, exactly
        causes = (_CAUSE_OF_LAYER, _CAUSE_OF_MODEL) if engine == AS_IT_IS else (_CAUSE_OF_ENGINE.format(engine),) * 2
        refuse(causes[0], result.layers)
        refuse(causes[1], {} if result.whole.holds else {"the model": str(result.whole)})
        found[engine] = f"{len(recorded)} layers alone within one step; {result.whole}"
    if engines:
        size = next(size for size in BATCHES if size != len(example))
        batch = example[torch.arange(size) % len(example)]
        first = VERIFIED_BY[engines[0]][0]
        noise = own.rounding if first == AS_IT_IS else own.noise
        again = agreement(content, logits_in_float32(model, batch), noise, batch, name_of_input, first)
        refuse(_CAUSE_OF_BATCH, {} if again.holds else {f"a batch of {size}": str(again)})
        found["other batch"] = f"{size} inputs; {again}"
    if "onnxruntime" in engines:
        count = integer_layers(content, exact=bool(rounded))
        found["integers"] = f"{count} of {len(layers)} layers run in integers in {EXACT if rounded else ROUNDED}"
    return Verification(found, bool(rounded), rounded)


def _better_exactly(rounded: _Seen, seen: Callable[[str], _Seen]) -> _Seen | None:
    """Return what ONNX Runtime computes with biases in float, or `None` if rounding them does not count.

    Args:
        rounded: What it computes with rounded ones.
    """
    if rounded.holds and rounded.whole.difference <= FAR:
        return None
    exactly = seen(EXACT)
    nearer = exactly.whole.difference < rounded.whole.difference / 2
    return exactly if exactly.holds and (nearer or not rounded.holds) else None


_CAUSE_OF_LAYER = "layers do not compute what the model's do"
_CAUSE_OF_ENGINE = (
    "{} computes something else once it optimizes the graph: its integer products saturate on this CPU "
    "(if it was exported for another target than 'cpu'), or it fuses nodes unfaithfully; more bits move less, and "
    "`engines` says which engines to verify it for"
)
_CAUSE_OF_BATCH = (
    "the graph predicts something else than the model for another number of inputs than it was traced with: the model "
    "computes with the size of its batch as if it were a constant"
)
_CAUSE_OF_MODEL = (
    "the graph does not predict what the model predicts although its layers are right: something between them is not "
    "traced faithfully (control flow that depends on values, for example)"
)


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
    return isinstance(quantizer, Quantizer) and ActivationGrid.of(quantizer).offset is not None

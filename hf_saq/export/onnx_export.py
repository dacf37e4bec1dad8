"""Export a quantized model to an integer graph of ONNX, in the layout that other tools of the ecosystem read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.wrapping import without_wrappers
from .checks import Verification, verify
from .example_inputs import example_inputs
from .extras import ROUNDS_BIASES, check_engine, installed_engines, needed
from .integer_copy import integer_copy
from .integer_layers import IntegerLayer
from .layout import MODEL_FILE, check_free, write_export
from .passes import convolutions_to_products, run_in_integers, store, widen_codes
from .report import ExportedLayer, ExportReport
from .stored_grids import CODE_RANGE
from .targets import check_target, fit_to_target
from .tracing import trace

TUNED_FOR = (None, "onnxruntime")


def export_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    weights: str = "int8",
    target: str = "cpu",
    tuned_for: str | None = None,
    example: Tensor | None = None,
    image_size: int | tuple[int, int] | None = None,
    processor: Any = None,
    check: bool = True,
    engines: Sequence[str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a quantized model as an integer graph that ONNX Runtime, OpenVINO and others run.

    The graph has the learned scales and the integer codes of the model, in `QuantizeLinear` and `DequantizeLinear`
    nodes. Its batch dimension is dynamic; height and width are those of the images it was exported for. `directory`
    gets `config.json`, `onnx/model_quantized.onnx` and, if there is a processor, `preprocessor_config.json`. All files
    are written at the end, when everything else has succeeded. The model itself is left as it is.

    Args:
        model: A quantized and calibrated model, in float or packed storage.
        directory: What to write; empty or not there, unless `overwrite`.
        weights: `"int8"`, which engines run fastest, or `"int4"`: weights of up to 4 bits take 4 bits in the file.
        target: What runs it: `"cpu"`, any CPU; `"cpu-vnni"`, CPUs that sum products in 32 bits; or `"gpu"`. For
            `"cpu"` the products of 8-bit weights with 8-bit inputs that some get wrong are computed in two halves,
            exactly; for the others a warning names these layers.
        tuned_for: `"onnxruntime"` writes convolutions as products of matrices where that engine would run them in
            float, which is what makes residual CNNs fast in it and slow in others. By default they stay as they are.
        example: Inputs `(batch, ...)`, of any batch. Images of noise are made if there are none; real ones are better.
        image_size: Height and width in pixels, where neither the processor nor the model's configuration says.
        processor: The image processor to store with it.
        check: Whether to verify before writing: codes and scales are equal; each layer alone, on its input in the
            model, is within one step, but for a few outputs at edges between two; logits are about as near to the
            model's as those to themselves, for another number of inputs too.
        engines: What to verify it with, of `"onnxruntime"` and `"openvino"`; `None` for those that are installed.
        overwrite: Whether files of an earlier export may be replaced, or a graph be put beside this model's own.

    Raises:
        ExportCheckError: If a check fails: a `ValueError` that says which, and of which layers.
        ValueError: If an argument is wrong, the model is not quantized, does not run on the example or cannot be
            traced, a grid does not fit into an integer graph, or `directory` holds files already, or another model.
        RuntimeError: If the model is not calibrated.
        ImportError: If a library is missing; says which extra installs it.
    """
    if weights not in CODE_RANGE:
        raise ValueError(f"weights={weights!r}; expected one of {list(CODE_RANGE)}.")
    check_target(target)
    if tuned_for not in TUNED_FOR:
        raise ValueError(f"tuned_for={tuned_for!r}; expected one of {list(TUNED_FOR)}.")
    model, directory = without_wrappers(model), Path(directory)
    check_free(directory, overwrite, model)
    engines = installed_engines() if engines is None else engines
    if isinstance(engines, str) or (check and not engines):
        raise ValueError(
            f"engines={engines!r}; expected a list of engines, as ['onnxruntime'], or check=False to verify nothing."
        )
    for engine in engines:
        check_engine(engine)
    for library in ("onnx", "onnxscript", *(engines if check else ())):
        needed(library)
    example = example_inputs(model, example, image_size, processor)
    copied = integer_copy(model, weights)
    graph_model = trace(copied, example)
    folded = run_in_integers(graph_model)
    if tuned_for == "onnxruntime":
        convolutions_to_products(graph_model)
    if weights == "int8":
        widen_codes(graph_model)
    split = fit_to_target(graph_model, target)
    store(graph_model, weights)
    content = needed("onnx_ir").to_proto(graph_model).SerializeToString()
    seen = verify(model, copied, content, folded, example, engines) if check else Verification({})
    layers = _layers(copied, graph_model, split)
    report = ExportReport(MODEL_FILE, len(content), weights, target, layers, seen.found, seen.exact)
    write_export(directory, content, report, getattr(model, "config", None), processor)
    if seen.exact:
        warnings.warn(
            "ONNX Runtime rounds biases of convolutions, which moves what this graph predicts: "
            f"{seen.rounded}. ExportedClassifier loads it with exact=True, which is slower; other programs must leave "
            f"out the optimizer {ROUNDS_BIASES!r} (disabled_optimizers), or use OpenVINO, which does not round them.",
            stacklevel=2,
        )
    return report


def _layers(copied: nn.Module, graph_model: Any, split: list[str]) -> tuple[ExportedLayer, ...]:
    initializers = graph_model.graph.initializers
    found = []
    for name, layer in copied.named_modules():
        if isinstance(layer, IntegerLayer):
            activation_bits = None if layer.activation is None else (layer.activation.high + 1).bit_length() - 1
            if layer.grid is None:
                found.append(ExportedLayer(name, None, activation_bits, "float"))
            else:
                notes = ("two halves, for CPUs without VNNI",) if name in split else ()
                codes = initializers.get(f"{name}.codes")  # absent where a check was left out that asks for it
                stored = "unused" if codes is None else codes.const_value.dtype.name.lower()
                found.append(ExportedLayer(name, layer.grid.bits, activation_bits, stored, notes))
    return tuple(found)

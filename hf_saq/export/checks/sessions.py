"""Run graphs in engines, and read what ONNX Runtime makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import ROUNDS_BIASES, compiled_by_openvino, in_one_line, needed
from .refusing import ExportCheckError

Inputs = dict[str, np.ndarray]

INTEGER_OPERATORS = {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
"""Operators of ONNX Runtime that multiply integers."""


AS_IT_IS = "ONNX Runtime, optimizations off"
"""Runs node by node what the graph says."""
ROUNDED, EXACT = "ONNX Runtime", "ONNX Runtime, biases of convolutions in float"
"""With and without the optimizer `ROUNDS_BIASES`."""


def onnxruntime_session(
    content: bytes, optimized: bool = True, saved_as: Path | None = None, exact: bool = False
) -> Any:
    """Load a graph on one thread of the CPU.

    Args:
        optimized: Whether the engine may rewrite it.
        exact: Whether biases of convolutions stay in float.
        saved_as: Where to write what it made of it.
    """
    runtime: Any = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if saved_as is not None:
        options.optimized_model_filepath = str(saved_as)
    without = [ROUNDS_BIASES] if exact else []
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=without)


def _run_onnxruntime(
    content: bytes, inputs: Inputs, optimized: bool = True, exact: bool = False
) -> dict[str, np.ndarray]:
    loaded = onnxruntime_session(content, optimized, exact=exact)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, inputs), strict=True))


def _run_openvino(content: bytes, inputs: Inputs) -> dict[str, np.ndarray]:
    compiled = compiled_by_openvino(content, INFERENCE_NUM_THREADS=1)
    # An output may have the names of several values, where nodes between them were optimized away.
    return {name: array for output, array in compiled(inputs).items() for name in output.get_names()}


RUNS: dict[str, Callable[[bytes, Inputs], dict[str, np.ndarray]]] = {
    AS_IT_IS: lambda content, inputs: _run_onnxruntime(content, inputs, optimized=False),
    ROUNDED: _run_onnxruntime,
    EXACT: lambda content, inputs: _run_onnxruntime(content, inputs, exact=True),
    "OpenVINO": _run_openvino,
}
"""What runs a graph once: inputs by name -> outputs by name."""
LIBRARY_OF = {AS_IT_IS: "onnxruntime", ROUNDED: "onnxruntime", EXACT: "onnxruntime", "OpenVINO": "openvino"}
VERIFIED_BY = {"onnxruntime": (AS_IT_IS, ROUNDED), "openvino": ("OpenVINO",)}
"""Library -> what of [`RUNS`] verifies a graph for it."""


def run_graph(engine: str, content: bytes, inputs: Inputs) -> dict[str, np.ndarray]:
    """Run a graph once.

    Args:
        engine: A key of [`RUNS`].

    Raises:
        ExportCheckError: If the engine cannot load the graph, or fails on these inputs.
    """
    try:
        return RUNS[engine](content, inputs)
    except ImportError:
        raise
    except Exception as error:
        others = [library for library in VERIFIED_BY if library != LIBRARY_OF[engine]]
        raise ExportCheckError(
            f"export not written, {engine} cannot run the graph: {in_one_line(error)} "
            f"To export for other engines alone, pass engines={others} (--engines {' '.join(others)})."
        ) from error


def integer_layers(content: bytes, exact: bool = False) -> int:
    """Count the products of stored integers that ONNX Runtime runs in integers, in the graph it optimizes."""
    onnx: Any = needed("onnx")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "optimized.onnx"
        onnxruntime_session(content, saved_as=path, exact=exact)
        graph = onnx.load(path).graph
    integers = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type in integers and len(tensor.dims) > 1}
    return sum(node.op_type in INTEGER_OPERATORS and bool(stored.intersection(node.input)) for node in graph.node)

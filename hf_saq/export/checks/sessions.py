"""Run graphs in engines, and read what ONNX Runtime makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import OPENVINO_PROPERTIES, needed

Inputs = dict[str, np.ndarray]

INTEGER_OPERATORS = {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
"""Operators of ONNX Runtime that multiply integers."""


AS_IT_IS = "ONNX Runtime, optimizations off"
"""Runs node by node what the graph says."""


def onnxruntime_session(content: bytes, optimized: bool = True, saved_as: Path | None = None) -> Any:
    """Load a graph on one thread of the CPU.

    Args:
        optimized: Whether the engine may rewrite it.
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
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run_onnxruntime(content: bytes, inputs: Inputs, optimized: bool = True) -> dict[str, np.ndarray]:
    loaded = onnxruntime_session(content, optimized)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, inputs), strict=True))


def _run_openvino(content: bytes, inputs: Inputs) -> dict[str, np.ndarray]:
    core: Any = needed("openvino").Core()
    properties = {**OPENVINO_PROPERTIES, "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(content), "CPU", properties)
    # An output may have the names of several values, where nodes between them were optimized away.
    return {name: array for output, array in compiled(inputs).items() for name in output.get_names()}


RUNS: dict[str, Callable[[bytes, Inputs], dict[str, np.ndarray]]] = {
    AS_IT_IS: lambda content, inputs: _run_onnxruntime(content, inputs, optimized=False),
    "ONNX Runtime": _run_onnxruntime,
    "OpenVINO": _run_openvino,
}
"""What runs a graph once: inputs by name -> outputs by name."""
ENGINES = {"onnxruntime": (AS_IT_IS, "ONNX Runtime"), "openvino": ("OpenVINO",)}
"""Library -> what of [`RUNS`] verifies a graph for it."""


def integer_layers(content: bytes) -> int:
    """Count the products of stored integers that ONNX Runtime runs in integers, in the graph it optimizes."""
    onnx: Any = needed("onnx")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "optimized.onnx"
        onnxruntime_session(content, saved_as=path)
        graph = onnx.load(path).graph
    integers = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type in integers and len(tensor.dims) > 1}
    return sum(node.op_type in INTEGER_OPERATORS and bool(stored.intersection(node.input)) for node in graph.node)

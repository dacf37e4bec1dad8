"""Run graphs in ONNX Runtime, and read what it made of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import needed

INTEGER_OPERATORS = {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
"""Operators of ONNX Runtime that multiply integers."""


def session(content: bytes, optimized: bool, saved_as: Path | None = None) -> Any:
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


def run(content: bytes, inputs: dict[str, np.ndarray], optimized: bool) -> dict[str, np.ndarray]:
    """Run a graph once; return its outputs by name."""
    loaded = session(content, optimized)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, inputs), strict=True))


def integer_layers(content: bytes) -> int:
    """Count the products of stored integers that ONNX Runtime runs in integers, in the graph it optimizes."""
    onnx: Any = needed("onnx")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "optimized.onnx"
        session(content, optimized=True, saved_as=path)
        graph = onnx.load(path).graph
    integers = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type in integers and len(tensor.dims) > 1}
    return sum(node.op_type in INTEGER_OPERATORS and bool(stored.intersection(node.input)) for node in graph.node)

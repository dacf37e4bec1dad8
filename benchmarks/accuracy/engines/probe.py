"""Find out whether an engine adds products of 8-bit integers up in 16 bits: with two of them that do not fit there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_saq.export.extras import needed

from .elsewhere import run_elsewhere

LENGTH, WIDTH, LARGEST_INPUT, LARGEST_WEIGHT = 64, 16, 255, 127


def write_probe(directory: Path) -> tuple[Path, Path]:
    """Write a product of the largest codes as a graph, and the input that makes them."""
    onnx = needed("onnx")
    value, array, node = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array, onnx.helper.make_node
    constants: dict[str, Any] = {
        "one": np.float32(1),
        "unsigned zero": np.uint8(0),
        "signed zero": np.int8(0),
        "weight": np.full((LENGTH, WIDTH), LARGEST_WEIGHT, np.int8),
    }
    graph = onnx.helper.make_graph(
        [
            node("QuantizeLinear", ["x", "one", "unsigned zero"], ["codes"]),
            node("DequantizeLinear", ["codes", "one", "unsigned zero"], ["input"]),
            node("DequantizeLinear", ["weight", "one", "signed zero"], ["factor"]),
            node("MatMul", ["input", "factor"], ["y"]),
        ],
        "probe",
        [value("x", onnx.TensorProto.FLOAT, ["batch", LENGTH])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [array(np.asarray(content), name) for name, content in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, directory / "probe.onnx")
    np.save(directory / "probe.npy", np.full((2, LENGTH), LARGEST_INPUT, np.float32))
    return directory / "probe.onnx", directory / "probe.npy"


def saturates(engine: str, place: str, directory: Path) -> dict[str, Any]:
    """Tell whether the largest products saturate on `engine`, run at `place`."""
    found = float(run_elsewhere(engine, place, *write_probe(directory))[0, 0])
    expected = float(LENGTH * LARGEST_INPUT * LARGEST_WEIGHT)
    return {"expected": expected, "found": found, "saturates": found != expected}

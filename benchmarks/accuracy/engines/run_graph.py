"""Run a graph on images with one engine; needs numpy and the engine only.

    python benchmarks/accuracy/engines/run_graph.py GRAPH IMAGES.npy LOGITS.npy --engine onnxruntime

It runs as a file, without the rest of the package: `elsewhere` starts it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 50
OPENVINO_PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""As `hf_saq.export.extras` has them."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("graph", type=Path)
    parser.add_argument("images", type=Path, help="float32 (n, channels, height, width)")
    parser.add_argument("logits", type=Path, help="what to write, (n, classes)")
    parser.add_argument("--engine", choices=("onnxruntime", "openvino", "onnxruntime-exact-bias"), required=True)
    args = parser.parse_args(argv)
    images = np.load(args.images)
    run = ENGINES[args.engine](str(args.graph))
    np.save(args.logits, np.concatenate([run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]))


def onnxruntime(graph: str, without: Sequence[str] = ()) -> Callable[[np.ndarray], np.ndarray]:
    """Load a graph; `without` names optimizers of the engine that are left out."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
    )
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino(graph: str) -> Callable[[np.ndarray], np.ndarray]:
    import openvino as ov

    properties: dict[str, Any] = {**OPENVINO_PROPERTIES, "INFERENCE_NUM_THREADS": 1}
    core = ov.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", properties)
    return lambda x: np.array(compiled(x)[0])


EXACT_BIAS = "onnxruntime-exact-bias"
ENGINES: dict[str, Callable[[str], Callable[[np.ndarray], np.ndarray]]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    EXACT_BIAS: partial(onnxruntime, without=["WeightBiasQuantization"]),
}
"""The last leaves biases of convolutions in float, where the first rounds them to the product of the two scales."""


if __name__ == "__main__":
    main()

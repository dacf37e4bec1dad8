"""Load a graph in an engine. Nothing that is imported here takes time: engines are, when they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .extras import ROUNDS_BIASES, compiled_by_openvino, needed

RunFunction = Callable[[np.ndarray], np.ndarray]
"""Computes logits from inputs, both float32."""


def _onnxruntime(content: bytes, threads: int | None, exact: bool = False) -> RunFunction:
    runtime: Any = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    without = [ROUNDS_BIASES] if exact else []
    session = runtime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"], disabled_optimizers=without
    )
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _openvino(content: bytes, threads: int | None, exact: bool = False) -> RunFunction:  # noqa: ARG001 (it always is)
    compiled = compiled_by_openvino(content, **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}))
    own = threading.local()

    def run(x: np.ndarray) -> np.ndarray:
        # Give each thread a request of its own: a call while another one runs is refused, or gets that one's inputs.
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        return own.request.infer(x, share_inputs=True)[0]

    return run


RUNNERS: dict[str, Callable[..., RunFunction]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}

"""Load one form in the process that measures it; import only what that form needs, so that memory is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

RunFunction = Callable[[np.ndarray], np.ndarray]
"""Computes logits from inputs, both float32."""
Load = Callable[[], RunFunction]


def _torch(path: Path, threads: int, quantized: bool, compiled: bool = False, decoded_once: bool = False) -> Load:
    import torch

    from ..conversion import keep_decoded
    from ..outputs import logits_of
    from ..storage.saved_directory import load_float, load_saved

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)

    def load() -> RunFunction:
        model = load_saved(str(path))[0] if quantized else load_float(path)
        if decoded_once:
            keep_decoded(model)
        forward, dtype = torch.compile(model) if compiled else model, model.dtype

        @torch.inference_mode()
        def run(x: np.ndarray) -> np.ndarray:
            # Cast both ways: numpy has no bfloat16, in which the model may be stored.
            return logits_of(forward(torch.from_numpy(x).to(dtype))).float().numpy()

        return run

    return load


def _engine(name: str) -> Callable[[Path, int], Load]:
    def prepare(path: Path, threads: int) -> Load:
        from ..export.engines import RUNNERS
        from ..export.extras import needed

        needed(name)
        return lambda: RUNNERS[name](path.read_bytes(), threads)

    return prepare


LOADERS: dict[str, Callable[[Path, int], Load]] = {
    "float": lambda path, threads: _torch(path, threads, quantized=False),
    "compiled": lambda path, threads: _torch(path, threads, quantized=False, compiled=True),
    "quantized": lambda path, threads: _torch(path, threads, quantized=True),
    "decoded-once": lambda path, threads: _torch(path, threads, quantized=True, decoded_once=True),
    "onnxruntime": _engine("onnxruntime"),
    "openvino": _engine("openvino"),
}
"""Kind of form -> imports its libraries and returns what loads it."""

"""List the forms of a model that are measured, and write each one to a file that a process of its own can load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import attention_interface, dequantize, is_packed, pack, unpack
from ..export import export_onnx
from ..export.extras import needed
from ..export.layout import MODEL_FILE
from ..export.passes import forget_shapes
from ..export.targets import check_target
from ..export.tracing import trace
from ..storage.saved_directory import load_saved, local_directory
from ..storage.weight_files import weight_file_bytes


@dataclass(frozen=True)
class Form:
    """Describes one form.

    Attributes:
        loader: What runs it; a key of `loading.LOADERS`.
        file: What it is loaded from; a key of `WRITERS`. Forms may share one.
        libraries: Extras that it needs.
        about: What it is, in a few words.
    """

    loader: str
    file: str
    libraries: tuple[str, ...]
    about: str


FORMS: dict[str, Form] = {
    "float": Form("float", "float", (), "dequantized, PyTorch eager"),
    "float-compiled": Form("compiled", "float", (), "dequantized, torch.compile"),
    "fake-quantized": Form("quantized", "fake-quantized", (), "as it trains, PyTorch eager"),
    "packed": Form("quantized", "packed", (), "PyTorch eager, decodes at every call"),
    "packed-decoded-once": Form("decoded-once", "packed", (), "PyTorch eager, keeps decoded weights in memory"),
    "onnx-float": Form("onnxruntime", "onnx-float", ("onnxruntime", "onnxscript"), "dequantized, ONNX Runtime"),
    "onnx-int8": Form("onnxruntime", "onnx-int8", ("onnxruntime", "onnxscript"), "weights=int8, ONNX Runtime"),
    "onnx-int8-tuned": Form(
        "onnxruntime",
        "onnx-int8-tuned",
        ("onnxruntime", "onnxscript"),
        "weights=int8, tuned_for=onnxruntime, ONNX Runtime",
    ),
    "onnx-int4": Form("onnxruntime", "onnx-int4", ("onnxruntime", "onnxscript"), "weights=int4, ONNX Runtime"),
    "openvino-float": Form("openvino", "onnx-float", ("openvino", "onnxscript"), "dequantized, OpenVINO"),
    "openvino-int8": Form("openvino", "onnx-int8", ("openvino", "onnxscript"), "weights=int8, OpenVINO"),
}
"""All forms, in the order of the table."""


class StoredForms:
    """Writes the forms of the model that is saved in `source`, on demand, into the directory `stage`.

    Raises:
        ValueError: If `source` is no saved quantized model, or the size of its images is unknown.
    """

    def __init__(self, source: str, stage: Path, target: str):
        check_target(target)
        self.directory, self.stage, self.target = local_directory(source), stage, target
        self.model, self.processor = load_saved(source)
        self._written: dict[str, tuple[Path, int]] = {}

    def write(self, form: Form, example: Tensor) -> tuple[Path, int]:
        """Return the path that `form` is loaded from, and the bytes of its weight files or graph.

        Raises:
            ImportError: If a library is missing; says which extra installs it.
            ValueError: If the model has no such form.
        """
        for library in form.libraries:
            needed(library)
        if form.file not in self._written:
            with torch.no_grad():
                self._written[form.file] = WRITERS[form.file](self, self.stage / form.file, example)
        return self._written[form.file]

    @cached_property
    def float_model(self) -> nn.Module:
        return dequantize(self.model).eval()

    def save(self, model: Any, path: Path) -> tuple[Path, int]:
        model.save_pretrained(path)
        return path, _size(path)


def _float(forms: StoredForms, path: Path, _: Tensor) -> tuple[Path, int]:
    return forms.save(forms.float_model, path)


def _fake_quantized(forms: StoredForms, path: Path, _: Tensor) -> tuple[Path, int]:
    if is_packed(forms.model):
        return forms.save(unpack(forms.model).eval(), path)
    return forms.directory, _size(forms.directory)


def _packed(forms: StoredForms, path: Path, _: Tensor) -> tuple[Path, int]:
    if is_packed(forms.model):
        return forms.directory, _size(forms.directory)
    return forms.save(pack(forms.model), path)


def _onnx_float(forms: StoredForms, path: Path, example: Tensor) -> tuple[Path, int]:
    model = nn.Module.to(forms.float_model, device="cpu", dtype=torch.float32)
    attention_interface.compute_openly(model)  # as the quantized graph does, so that both are compared fairly
    graph_model = trace(model, example)
    forget_shapes(graph_model)
    content = needed("onnx_ir").to_proto(graph_model).SerializeToString()
    path.mkdir()
    (path / "model.onnx").write_bytes(content)
    return path / "model.onnx", len(content)


def _exported(weights: str, tuned_for: str | None = None) -> Callable[[StoredForms, Path, Tensor], tuple[Path, int]]:
    def write(forms: StoredForms, path: Path, example: Tensor) -> tuple[Path, int]:
        # Not checked here: what it predicts is compared in any case, and reported.
        report = export_onnx(
            forms.model,
            path,
            weights=weights,
            target=forms.target,
            tuned_for=tuned_for,
            example=example[:2],
            check=False,
        )
        return path / MODEL_FILE, report.size

    return write


def _size(path: Path) -> int:
    return weight_file_bytes(path) or 0


WRITERS: dict[str, Callable[[StoredForms, Path, Tensor], tuple[Path, int]]] = {
    "float": _float,
    "fake-quantized": _fake_quantized,
    "packed": _packed,
    "onnx-float": _onnx_float,
    "onnx-int8": _exported("int8"),
    "onnx-int8-tuned": _exported("int8", tuned_for="onnxruntime"),
    "onnx-int4": _exported("int4"),
}

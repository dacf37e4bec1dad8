"""Import the libraries that exporting needs, which not everybody has installed, and say how to get them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXTRA_OF = {"onnx": "onnx", "onnx_ir": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}
"""Library -> the extra of hf-saq that installs it."""


def needed(library: str) -> ModuleType:
    """Import `library`.

    Raises:
        ImportError: If it is not installed; says which extra to install.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(
            f"{library} is needed for this and could not be imported ({error}); install it with "
            f"`pip install 'hf-saq[{EXTRA_OF[library]}]'`."
        ) from error

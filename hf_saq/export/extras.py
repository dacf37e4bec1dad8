"""Import the libraries that exporting needs, which not everybody has installed: how to get them, how to call them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..installing import how_to_install

EXTRA_OF = {
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": "openvino",
    "PIL.Image": "examples",
}
"""Library -> the extra of hf-saq that installs it."""

ENGINES = ("onnxruntime", "openvino")
"""Libraries that run an export."""

OPENVINO_PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""What makes OpenVINO compute the graph as it is: without them it computes in bfloat16 what is not integer, where a
CPU has that type, and quantizes inputs of int4 weights again, in groups of its own."""


ROUNDS_BIASES = "WeightBiasQuantization"
"""The optimizer of ONNX Runtime that rounds the bias of a convolution to the product of its two scales."""


MOST_SAID = 300
"""Characters of a library's error that are passed on."""


def in_one_line(error: BaseException) -> str:
    """Return what a library says of an error as one sentence, cut where it is long."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]}..."
    return said if said.endswith((".", "!", "?")) else f"{said}."


def check_engine(engine: str) -> None:
    """Raise `ValueError` if there is no such engine."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}; expected one of {list(ENGINES)}.")


def check_can_export(engine: str) -> None:
    """Check that models can be exported, verified and run on `engine`, before anything is spent on them.

    Raises:
        ValueError: If there is no such engine.
        ImportError: If a library is missing; says which extra installs it.
    """
    check_engine(engine)
    for library in ("onnx", "onnxscript", "onnxruntime", engine):
        needed(library)


def installed_engines() -> list[str]:
    """List the engines that can be imported, and ONNX Runtime in any case: verifying needs one."""
    return [engine for engine in ENGINES if engine == "onnxruntime" or find_spec(engine) is not None]


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
            f"{how_to_install(EXTRA_OF[library])}."
        ) from error


def compiled_by_openvino(content: bytes, **properties: Any) -> Any:
    """Compile a graph for CPUs with OpenVINO, which then computes it as it is.

    Args:
        content: The graph.
        properties: Of OpenVINO, beside [`OPENVINO_PROPERTIES`].

    Returns:
        An `openvino.CompiledModel`.

    Raises:
        ImportError: If OpenVINO is not installed; says which extra installs it.
    """
    core = _core_of(needed("openvino"))
    return core.compile_model(core.read_model(content), "CPU", {**OPENVINO_PROPERTIES, **properties})


@lru_cache(maxsize=1)
def _core_of(openvino: Any) -> Any:
    """Make the one core of this process, which stays.

    On CPUs with AVX512 each core gives the thread a stack for signal handlers, and puts back the one before when it
    goes. Where two go in the order in which they came, a stack stays that is no memory any more; the next signal, as
    the workers of a `DataLoader` send one, is then written over whatever lies there.
    """
    return openvino.Core()

"""Choose the backend by what the user asked for, what saves time, and what is possible.

`"auto"`, the default, compiles where it pays and never on CPU before this process has quantized `PAYS_AFTER` elements,
so that tests and short runs do not wait for a compiler. Wherever compilation is not possible, eager takes over.
"""

from __future__ import annotations

import os
import warnings
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

Backend = Literal["auto", "eager", "compiled"]

VARIABLE = "HF_SAQ_KERNELS"
"""Environment variable with the name of the backend; `set_backend` overrides it."""
SMALLEST = 2**16
"""Elements from which `"auto"` may compile: below, the overhead of a compiled call (0.06 ms) eats what it saves."""
PAYS_AFTER = 2**35
"""Elements, counted in tensors of at least `SMALLEST`, after which `"auto"` compiles on CPU. Where vectors are wide,
compiled code saves 0.2 to 0.3 ns for each of them (a step of ViT-S/16 has 244 million; docs/cost.md), so that by then
a compilation of ten seconds would have been worth it."""


def _initial() -> Backend:
    name = os.environ.get(VARIABLE, "auto")
    if name not in get_args(Backend):
        raise ValueError(f"{VARIABLE}={name!r}; expected one of {list(get_args(Backend))}.")
    return cast(Backend, name)


_backend: Backend = _initial()
_quantized_elements = 0
_impossible = False


def set_backend(name: Backend) -> Backend:
    """Choose how fake quantization is computed, in this process and from now on.

    Args:
        name: `"eager"`, `"compiled"` (from the first call on and at any size) or `"auto"`, see the module.

    Returns:
        The name of the backend before.

    Raises:
        ValueError: If there is no such backend.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"set_backend({name!r}): expected one of {list(get_args(Backend))}.")
    before, _backend = _backend, name
    return before


def compiles(x: Tensor) -> bool:
    """Decide whether this call goes to compiled code."""
    global _quantized_elements
    if _backend == "eager" or _impossible:
        return False
    size = x.numel()
    if _backend == "auto":
        if size < SMALLEST:
            return False
        if x.device.type == "cpu" and _quantized_elements < PAYS_AFTER:
            _quantized_elements += size
            return False
    return (
        size > 1
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.device.type in ("cpu", "cuda")
        and type(x) in (Tensor, nn.Parameter)  # no DTensor, no fake tensor
        # Neither a counter of operations nor a functional transform nor `torch.device` as a context.
        and _get_current_dispatch_mode() is None
        and _get_current_function_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_NO_COMPILER = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")
"""What inductor raises where a compiler is missing or does not work."""


def give_up(error: Exception) -> None:
    """Compile no more in this process, and say so."""
    global _impossible
    _impossible = True
    error = getattr(error, "inner_exception", error)  # torch.compile wraps what its backend raised
    advice = "Install a C++ compiler (CPU) or Triton (CUDA), or set" if type(error).__name__ in _NO_COMPILER else "Set"
    warnings.warn(
        f"hf_saq: fake quantization runs uncompiled, which is slower: torch.compile failed with "
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '(no message)'}. "
        f"{advice} {VARIABLE}=eager to silence this.",
        stacklevel=3,
    )


def leave_uncompiled() -> None:
    """Say that torch refuses to compile one kind of use once more; all others stay compiled."""
    warnings.warn(
        "hf_saq: one kind of fake quantization runs uncompiled from here on, which is slower: it would have to be "
        f"compiled more than {torch._dynamo.config.recompile_limit} times in this process "
        "(torch._dynamo.config.recompile_limit). Raise that limit, or keep what compiled code depends on as it is, "
        f"the number of threads for example; set {VARIABLE}=eager to silence this.",
        stacklevel=3,
    )

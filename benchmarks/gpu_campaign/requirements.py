"""What the machine has, and what the campaign would miss there, before anything runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..shared.runs import version_of

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "timm", "safetensors", "scipy", "pytest", "datasets")
OPTIONAL = {"datasets": "tests of the example script are skipped", "triton": "compiled kernels are not measured"}
"""What is lost without a package that nothing else needs."""


def machine(device: str) -> dict[str, Any]:
    """Describe the machine, JSON-plain: the card, its memory in bytes, cores, and versions of what runs."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "versions": {name: version_of(name) for name in PACKAGES}}
    found["versions"]["triton"] = version_of("triton")
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


def missing(device: str, file: Path, needs_data: bool) -> tuple[list[str], list[str]]:
    """List what the campaign cannot do without, and what it can, one sentence each."""
    fatal: list[str] = []
    lost: list[str] = []
    if device == "cuda" and not torch.cuda.is_available():
        fatal.append("torch sees no CUDA device; run on a machine with one, or rehearse with --rehearsal.")
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            (lost if name in OPTIONAL else fatal).append(f"{name} is not installed: {OPTIONAL.get(name, 'needed')}.")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        lost.append(f"triton is not installed: {OPTIONAL['triton']}.")
    if device == "cuda" and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        lost.append("no C compiler was found, which triton needs: steps with compiled kernels will fail.")
    if needs_data and not file.is_file():
        lost.append(f"{file} is not there: no model is trained. `make gpu-data` writes it where the data is.")
    return fatal, lost

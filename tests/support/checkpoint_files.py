"""Checkpoints of quantized models: loading them for exact comparisons, and changing them on disk."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_saq.storage.seal import KEY, digest_of_tensor


def load(directory: Path, **kwargs):
    """`from_pretrained`, then tensors moved out of the mapped file: there they lie at odd addresses, where
    convolutions may round differently, and equality would be a matter of luck."""
    found = AutoModelForImageClassification.from_pretrained(directory, **kwargs)
    model, *info = found if isinstance(found, tuple) else (found,)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return (model, *info) if info else model


def weights_file(directory: Path) -> Path:
    return directory / "model.safetensors"


def edit_weights(directory: Path, change, sealed: bool = False) -> None:
    """Rewrite the tensors on disk after `change(tensors)`, a dict, in place.

    Args:
        sealed: Whether a packed file shall look as if it had been saved like that, to test what is behind the seal.
    """
    with safe_open(weights_file(directory), "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights_file(directory))
    change(tensors)
    if sealed:
        seal = json.loads(metadata[KEY])
        seal["tensors"] = {name: digest_of_tensor(tensor) for name, tensor in tensors.items()}
        metadata[KEY] = json.dumps(seal)
    save_file(tensors, weights_file(directory), metadata=metadata)


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(changes)
    (directory / "config.json").write_text(json.dumps(config))

"""Decide which files are weights: saving, resuming, inspecting, pushing and the card all use this one list.

The names are those that transformers writes. Every other file belongs to somebody else and is neither counted nor
removed, also if it ends in `.safetensors`: a schedule's memory in `checkpoint-N`, for example.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

_NUMBER = 5 * "[0-9]"
# All of these are patterns of `fnmatch`. Only the last one matches a file in a folder.
ONE_FILE = "model.safetensors"
_SHARD = f"model-{_NUMBER}-of-{_NUMBER}.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
_PICKLED_INDEX = "pytorch_model*.bin.index.json"
_VARIANTS = ("model.*.safetensors", "model.safetensors.index.*.json")
_DISTRIBUTED = "*/*.distcp"

HINT = "import_hf_saq_first__this_model_is_quantized"
"""Name of an empty tensor in every saved quantized model. Readers that do not know the format list it among tensors
that they have no place for: with packed weights above their error, with float storage in their only warning."""

MODEL_FILES = (ONE_FILE, _SHARD, INDEX)
"""Patterns of the files that `from_pretrained` takes a model's weights from, as they are saved today."""


def is_model_file(name: str) -> bool:
    """Tell whether a save of a model writes a file of this name for its weights: one file, a shard or their index."""
    return _matches(name, *MODEL_FILES)


def is_index(name: str) -> bool:
    """Tell whether a file of this name is an index: it holds no weights, but says in which shards they are."""
    return _matches(name, INDEX, _PICKLED_INDEX)


def is_weight_file(name: str) -> bool:
    """Tell whether `from_pretrained` may take a file of this name, with any arguments, for weights or their index.

    Besides the files of today's format, these are older formats, adapters and variants (`model.fp16.safetensors`).
    """
    return "/" not in name and _matches(name, *MODEL_FILES, _ADAPTER, *_PICKLED, _PICKLED_INDEX, *_VARIANTS)


def weight_files(directory: str | Path) -> list[Path]:
    """List the safetensors files that hold the weights of the model saved in `directory`, by name."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return [file for file in files if _matches(file.name, ONE_FILE, _SHARD, _ADAPTER)]


def weight_file_bytes(directory: str | Path) -> int | None:
    """Add up the bytes of the weight files of the model saved in `directory`; return `None` if there are none."""
    sizes = [file.stat().st_size for file in weight_files(directory)]
    return sum(sizes) if sizes else None


def holds_weights(checkpoint: str | Path) -> bool:
    """Tell whether a training checkpoint has weights to go on from: safetensors, pickled, or distributed in shards."""
    checkpoint = Path(checkpoint)
    return bool(weight_files(checkpoint)) or any(
        any(checkpoint.glob(pattern)) for pattern in (*_PICKLED, _DISTRIBUTED)
    )


def _matches(name: str, *patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

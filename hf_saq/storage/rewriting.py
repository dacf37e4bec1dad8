"""Make one saved model from another: directories in, directories out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..conversion.forms import dequantize, pack
from .inspection import inspect_checkpoint
from .saved_directory import BESIDE, copy_files, local_directory, model_class, stored_config
from .staging import STAGE, staged
from .weight_files import weight_file_bytes


def pack_saved(source: str, target: str | Path) -> int:
    """Write the packed form of a model saved in float storage, with a copy of its image processor and tokenizer.

    Args:
        source: Directory of the saved model, or a repository on the Hub.
        target: Directory to write; it must be empty or not exist.

    Returns:
        Bytes of the weight files written.

    Raises:
        ValueError: If `source` is not such a model, its files are damaged, or `target` holds files already.
        OSError: If the Hub refuses or cannot be reached.
    """
    return _rewrite(source, Path(target), pack)


def dequantize_saved(source: str, target: str | Path) -> int:
    """Write the plain float model that a saved quantized one decodes to; loading it does not need hf_saq.

    Args:
        source: Directory of the saved model, or a repository on the Hub.
        target: Directory to write; it must be empty or not exist.

    Returns:
        Bytes of the weight files written.

    Raises:
        ValueError: If `source` is not a quantized model, its files are damaged, or `target` holds files already.
        OSError: If the Hub refuses or cannot be reached.
    """
    return _rewrite(source, Path(target), dequantize)


def _rewrite(source: str, target: Path, change: Callable[[nn.Module], nn.Module]) -> int:
    # What a killed run left in the stage does not count: the files are complete, or they are not there.
    if target.exists() and (not target.is_dir() or any(path.name != STAGE for path in target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; name a new one.")
    directory = local_directory(source)
    inspect_checkpoint(str(directory))  # raises where files are damaged or of different models
    kind = model_class(stored_config(directory))
    changed = change(kind.from_pretrained(directory))
    with staged(target) as stage:
        changed.save_pretrained(stage)  # type: ignore[operator]
        copy_files(BESIDE, directory, stage)
    size = weight_file_bytes(target)
    assert size is not None
    return size

"""Find a saved model: its directory, its `config.json`, its class, and the image processor next to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..config import QUANT_METHOD, SAQQuantizationConfig
from .weight_files import MODEL_FILES

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of an image processor; which of them it has depends on its age."""
NEEDED_FILES = ("config.json", *MODEL_FILES, *PROCESSOR_FILES)
"""Files that are downloaded from a repository: the model at its top level, no checkpoints in its folders."""


def local_directory(source: str, revision: str | None = None) -> Path:
    """Return the directory `source`, or the one to which the files of a repository of that name were downloaded.

    Raises:
        ValueError: If it is neither.
        OSError: If the Hub refuses or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"{source} is a file; expected the directory of a saved model or a repository on the Hub.")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(NEEDED_FILES)))
    except OSError as error:
        raise OSError(f"{source} is not a directory here and could not be had from the Hub: {error}") from error


def stored_config(directory: Path) -> PreTrainedConfig:
    """Read the `config.json` of a quantized model and check its `quantization_config`.

    Raises:
        ValueError: If it is missing or not one of ours.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json; expected the directory of a saved model.")
    config = AutoConfig.from_pretrained(directory)
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method")
    if method != QUANT_METHOD:
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config.quant_method is {method!r}; expected {QUANT_METHOD!r}, "
            "as in what hf_saq saves."
        )
    config.quantization_config = SAQQuantizationConfig.from_dict(found)
    return config


def load_saved(source: str) -> tuple[Any, Any]:
    """Load a saved quantized model, of the class that it was saved from, and its image processor.

    Args:
        source: Directory of the saved model, or a repository on the Hub.

    Returns:
        The model in evaluation mode, and the processor; `None` where there is none.

    Raises:
        ValueError: If `source` is not a quantized model.
        OSError: If the Hub refuses or cannot be reached.
    """
    directory = local_directory(source)
    model = model_class(stored_config(directory)).from_pretrained(directory)
    return model.eval(), AutoImageProcessor.from_pretrained(directory) if has_processor(directory) else None


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class that a stored model was saved from, or the automatic one."""
    # Accept nothing but a model: `architectures` comes from a file, which may name anything.
    found = named_model_class((config.architectures or [""])[0])
    return AutoModelForImageClassification if found is None else found


def named_model_class(name: Any) -> type[PreTrainedModel] | None:
    """Return the model class of transformers that has this name; `None` if there is none."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def has_processor(directory: str | Path) -> bool:
    """Tell whether a saved model has an image processor next to it."""
    return any((Path(directory) / name).is_file() for name in PROCESSOR_FILES)


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy the files of these `names` from `source` to `target`, as far as they exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)

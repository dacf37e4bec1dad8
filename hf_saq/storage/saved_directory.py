"""Find a saved model: its directory, its `config.json`, its class, and the image processor next to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..config import EXPORT_RECORD, QUANT_METHOD, SAQQuantizationConfig
from .weight_files import MODEL_FILES, weight_file_bytes

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of an image processor; which of them it has depends on its age."""
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer, which models of images and text have beside them."""
BESIDE = (*PROCESSOR_FILES, "video_preprocessor_config.json", *TEXT_FILES)
"""Files that a saved model needs beside it to be run, of which transformers copies none when a model is saved."""
TIMM = "timm_wrapper"
"""Type of the models of timm. What their image processor needs is in their `config.json`; it has no file."""
NEEDED_FILES = ("config.json", *MODEL_FILES, *BESIDE)
"""Files that are downloaded from a repository: the model at its top level, no checkpoints in its folders."""


def local_directory(source: str, revision: str | None = None, files: Sequence[str] = NEEDED_FILES) -> Path:
    """Return the directory `source`, or the one to which `files` of a repository of that name were downloaded.

    Raises:
        ValueError: If it is neither.
        OSError: If the Hub refuses or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"{source} is a file; expected the directory of a saved model or a repository on the Hub.")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except HFValidationError:
        raise ValueError(
            f"{source}: no such directory, and no name that a repository on the Hub could have; expected the "
            "directory of a saved model or NAMESPACE/NAME."
        ) from None
    except OSError as error:
        raise OSError(f"{source} is not a directory here and could not be had from the Hub: {error}") from error


def stored_config(directory: Path) -> PreTrainedConfig:
    """Read the `config.json` of a quantized model and check its `quantization_config`.

    Raises:
        ValueError: If it is missing, damaged or not one of ours.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; {_models_below(directory)}")
    _refuse_export(directory)
    fields = read_json_object(path)
    found = fields.get("quantization_config") or {}
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != QUANT_METHOD:
        what = f".quant_method is {method!r}" if isinstance(found, dict) else f" is {found!r}"
        raise ValueError(f"{path}: quantization_config{what}; expected {QUANT_METHOD!r}, as in what hf_saq saves.")
    named = fields.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{path}: architectures is {named!r}; expected a list with the name of a model class.")
    with damage_named(path, "is not read as the configuration of a model"):
        config = AutoConfig.from_pretrained(directory)
        config.quantization_config = SAQQuantizationConfig.from_dict(found)  # raises ValueError, which says enough
    return config


def is_export(directory: Path) -> bool:
    """Tell whether a directory holds an exported graph alone.

    A saved model may have its graph beside it, and its configuration then says so too; an export has no weights.
    """
    path = directory / "config.json"
    return path.is_file() and EXPORT_RECORD in read_json_object(path) and weight_file_bytes(directory) is None


def _refuse_export(directory: Path) -> None:
    if is_export(directory):
        raise ValueError(
            f"{directory} is an export, a graph without the weights of a model; expected the saved model that it was "
            "made from. What runs graphs is `hf-saq eval` and hf_saq.export.ExportedClassifier."
        )


def _models_below(directory: Path) -> str:
    """Say where a model may be meant: a training may have left several in folders of its directory."""
    found = sorted(file.parent.name for file in directory.glob("*/config.json"))
    return f"did you mean one of its folders: {', '.join(found)}?" if found else "expected that of a saved model."


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: If it holds something else or is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). It is cut off or damaged; get it again.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__}; expected a JSON object. It is damaged; get it again."
        )
    return found


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Turn whatever the fields of `path` make transformers raise into a `ValueError` that names the file.

    Raises:
        ImportError: If a library is missing that the model needs; the file is then as it should be.
    """
    try:
        yield
    except ImportError as error:  # transformers says in it how to install the library
        raise ImportError(f"{path}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a field can hold anything, and is used for anything
        raise ValueError(
            f"{path} {what} ({type(error).__name__}: {error}). One of its fields is damaged or belongs to another "
            "model; get it again."
        ) from error


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
    return model.eval(), saved_processor(directory)


def load_any_saved(source: str) -> tuple[Any, Any]:
    """Load a saved model, quantized or float, and its image processor; as [`load_saved`], of the same class."""
    directory = local_directory(source)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; {_models_below(directory)}")
    _refuse_export(directory)
    if read_json_object(path).get("quantization_config"):
        return load_saved(str(directory))
    with damage_named(path, "is not read as the configuration of a model"):
        model = load_float(directory)
    return model, saved_processor(directory)


def saved_processor(directory: Path) -> Any:
    """Load the image processor of a saved model or an export; `None` if it has none."""
    return AutoImageProcessor.from_pretrained(directory) if has_processor(directory) else None


def load_float(directory: Path) -> Any:
    """Load a saved model that is not quantized, of the class that it was saved from, in evaluation mode."""
    return model_class(AutoConfig.from_pretrained(directory)).from_pretrained(directory).eval()


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
    """Tell whether a saved model has an image processor: next to it, or inside its configuration, as those of timm."""
    if any((Path(directory) / name).is_file() for name in PROCESSOR_FILES):
        return True
    path = Path(directory) / "config.json"
    fields = read_json_object(path) if path.is_file() else {}
    return fields.get("model_type") == TIMM and bool(fields.get("pretrained_cfg"))


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy the files of these `names` from `source` to `target`, as far as they exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)

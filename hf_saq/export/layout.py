"""Write the directory of an export, and see beforehand what it would write over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from ..config import EXPORT_RECORD as RECORD
from ..storage import staged
from ..storage.saved_directory import PROCESSOR_FILES, TIMM
from ..storage.stored_tensors import tensor_with_other_values
from ..storage.weight_files import is_model_file
from .report import ExportReport

MODEL_FILE = "onnx/model_quantized.onnx"
"""Where transformers.js and optimum look for a quantized graph."""
CONFIG_FILE = "config.json"
EXPORTED_FILES = (CONFIG_FILE, MODEL_FILE, *PROCESSOR_FILES)
"""What running an export needs of a repository."""
EXPORT_VERSION = 1
NOT_OF_THE_MODEL = (
    *(RECORD, "storage", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"),
    *("use_cache", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
)
"""Fields of a configuration that say how a model was stored or is called, not which one it is."""


def check_free(directory: Path, overwrite: bool, model: nn.Module | None = None) -> None:
    """Raise `ValueError` if an export must not be written to `directory`.

    Args:
        overwrite: Whether an earlier export, or files of the quantized model itself, may be there.
        model: What is exported.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; expected a directory to write.")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise ValueError(
            f"{directory} holds files already; name another directory or pass overwrite=True (--overwrite)."
        )
    fields, config, holds_weights = _fields_of(directory), getattr(model, "config", None), _holds_weights(directory)
    if not holds_weights and (not fields or RECORD in fields):
        return
    if not fields and hasattr(config, "to_json_string"):
        raise ValueError(
            f"{directory} holds weights without a {CONFIG_FILE} that can be read, so that it is not known what they "
            "are. Save the model there first, or name another directory."
        )
    differences = _differences(fields, config) if fields else []
    if differences:
        raise ValueError(
            f"{directory} holds another model, whose {CONFIG_FILE} differs in {', '.join(differences[:5])}; name "
            "another directory."
        )
    if model is not None and holds_weights:
        if name := tensor_with_other_values(model, directory):
            raise ValueError(
                f"{directory} holds other weights of this {type(model).__name__}: {name} differs. Save the model "
                "there first, or name another directory."
            )


def _differences(fields: dict[str, Any], config: Any) -> list[str]:
    """Name what a stored configuration says otherwise than `config`, but for how weights are stored."""
    if not hasattr(config, "to_json_string"):
        return ["model_type"]
    own = json.loads(config.to_json_string(use_diff=False))
    for each in (own, fields := dict(fields)):
        quantization = each.get("quantization_config")
        if isinstance(quantization, dict):
            each["quantization_config"] = {k: v for k, v in quantization.items() if k not in NOT_OF_THE_MODEL}
    # Leave out what the class of the configuration does not know.
    fields.setdefault("quantization_config", None)
    for name in getattr(config, "sub_configs", {}):
        if isinstance(fields.get(name), dict) and isinstance(own.get(name), dict):
            # Compare what is stored of it; how a part is quantized, only float storage says.
            told = fields[name].keys() & own[name].keys() - {*NOT_OF_THE_MODEL, "quantization_config"}
            fields[name], own[name] = ({k: each[name][k] for k in told} for each in (fields, own))
    found = [name for name in fields if name in own and name not in NOT_OF_THE_MODEL and fields[name] != own[name]]
    return sorted(found, key=lambda name: (name != "model_type", name))


def _holds_weights(directory: Path) -> bool:
    return directory.is_dir() and any(is_model_file(path.name) for path in directory.iterdir())


def write_export(directory: Path, content: bytes, report: ExportReport, config: Any, processor: Any) -> None:
    """Write all files of an export; they replace those of an earlier one when all of them are complete.

    Args:
        content: The graph.
        config: The configuration of a model of transformers, or `None`.
        processor: The image processor to store, or `None`: that of an earlier export then goes, and that of a model
            whose weights lie in `directory` stays.
    """
    stale = _processor_of_earlier_export(directory)
    with staged(directory) as stage:
        (stage / MODEL_FILE).parent.mkdir(parents=True)
        (stage / MODEL_FILE).write_bytes(content)
        # Leave what says how weights beside the graph are stored.
        fields = _fields_of(directory) if _holds_weights(directory) else {}
        if not fields and hasattr(config, "save_pretrained"):
            config.save_pretrained(stage)
            fields = _fields_of(stage)
        fields[RECORD] = {
            "format_version": EXPORT_VERSION,
            "file": report.file,
            "sha256": hashlib.sha256(content).hexdigest(),
            "weights": report.weights,
            "target": report.target,
            "exact": report.exact,
        }
        (stage / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        if processor is not None and fields.get("model_type") != TIMM:  # there it is in the configuration
            processor.save_pretrained(stage)
        kept = {path.name for path in stage.iterdir()}
    for path in stale:
        if path.name not in kept:
            path.unlink()


def _processor_of_earlier_export(directory: Path) -> list[Path]:
    if RECORD not in _fields_of(directory) or _holds_weights(directory):
        return []
    return [directory / name for name in PROCESSOR_FILES if (directory / name).is_file()]


def _fields_of(directory: Path) -> dict[str, Any]:
    """Read the configuration of a model; {} if there is none, or none that can be read."""
    try:
        fields = json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}

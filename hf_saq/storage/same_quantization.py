"""Compare, field by field, how a saved model and the present one are quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..config import QUANT_METHOD, SAQQuantizationConfig
from ..layers import HoldsQuantizers
from ..quantizers import Quantizer
from .saved_directory import read_json_object
from .stored_tensors import StoredTensors

QUANTIZERS_FILE = "quantizers.json"
"""In checkpoints of plain modules: quantizer -> its kind, bits and shape of the scale."""
COMPARED = (
    "weight_bits",
    "activation_bits",
    "quantizer",
    "weight_granularity",
    "activation_mode",
    "first_last_bits",
    "quantize_attention",
    "share_inputs",
    "learn_input_scale",
    "overrides",
)
"""Fields that change what a model computes from the same tensors, or which of them it learns. `scale_init` only
changes first values."""


def stored_quantization(directory: str | Path) -> dict[str, Any]:
    """Read the `quantization_config` of a saved model, unchanged; return an empty one if it has none."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def store_quantizers(model: nn.Module, directory: str | Path) -> None:
    """Write how `model` is quantized into a checkpoint of it, where no configuration does so: a plain module."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is None and (found := _quantizers(model)):
        (Path(directory) / QUANTIZERS_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def stored_quantizers(directory: str | Path) -> dict[str, Any]:
    """Read what [`store_quantizers`] wrote; `{}` where it did not, as in earlier versions."""
    file = Path(directory) / QUANTIZERS_FILE
    return read_json_object(file) if file.is_file() else {}


def _quantizers(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {"quantizer": type(m).__name__, "bits": m.bits, "scale_shape": list(m.scale_shape)}
        for name, m in model.named_modules()
        if isinstance(m, Quantizer)
    }


def check_same_quantization(model: nn.Module, directory: str | Path) -> list[str]:
    """Raise `ValueError` unless the model saved in `directory` is quantized as `model` is.

    Returns:
        Names of the layers that were quantized at first and that hf_saq left in float before the model was saved.
    """
    own = getattr(getattr(model, "config", None), "quantization_config", None)
    found = stored_quantization(directory)
    is_ours = found.get("quant_method") == QUANT_METHOD
    if own is None and not is_ours:
        return _layers_stored_in_float(model, Path(directory))
    if own is None or not is_ours:
        kinds = ("a quantized model", "is in float: quantize it with the configuration of the checkpoint")
        if not is_ours:
            kinds = ("a float model", "is quantized: a checkpoint without scales cannot be gone on from")
        raise ValueError(
            f"{directory} is a checkpoint of {kinds[0]}, but this {type(model).__name__} {kinds[1]}. To start from "
            "its weights load it with from_pretrained, with a quantization_config where it has none."
        )
    stored = SAQQuantizationConfig.from_dict(found)
    _compare("storage", stored.storage, own.storage, model, directory)
    for name in COMPARED:
        _compare(name, getattr(stored, name), getattr(own, name), model, directory)
    _compare("order of overrides", list(stored.overrides), list(own.overrides), model, directory)
    if own.first_last_bits is not None and stored.first_last_modules is not None:
        _compare("first_last_modules", stored.first_last_modules, own.first_last_modules, model, directory)
    if own.share_inputs:
        _compare("shared_input_modules", stored.shared_input_modules, own.shared_input_modules, model, directory)
    theirs, ours = set(stored.modules_to_not_convert or ()), set(own.modules_to_not_convert or ())
    # Compare no lists of version 1: it does not separate what the user listed from what calibration added.
    listed = theirs - set(stored.modules_found_idle or ()) if stored.format_version > 1 else set()
    if listed - ours or (ours - set(own.modules_found_idle or ())) - theirs:
        _compare("modules_to_not_convert", sorted(theirs), sorted(ours), model, directory)
    return sorted(theirs - ours)


def _layers_stored_in_float(model: nn.Module, directory: Path) -> list[str]:
    """Find quantized layers of `model` that the checkpoint has no quantizers of, by the names of its tensors: a model
    that is not one of transformers is saved without a configuration."""
    prefixes = {
        name: tuple(f"{name}.{child}." for child, m in layer.named_children() if isinstance(m, Quantizer))
        for name, layer in model.named_modules()
        if isinstance(layer, HoldsQuantizers) and layer.own_quantizers()
    }
    if not prefixes:
        return []
    written = stored_quantizers(directory)
    for name, own in _quantizers(model).items():
        if name in written:
            _compare(name, written[name], own, model, directory)
    stored = StoredTensors(directory).names
    absent = [name for name, starts in prefixes.items() if not any(tensor.startswith(starts) for tensor in stored)]
    if len(absent) == len(prefixes):
        raise ValueError(
            f"{directory} is a checkpoint of a float model, but this {type(model).__name__} is quantized: a "
            "checkpoint without scales cannot be gone on from. Load it into the float model, then quantize that."
        )
    return absent


def _compare(name: str, stored: Any, own: Any, model: nn.Module, directory: str | Path) -> None:
    if stored != own:
        raise ValueError(
            f"{directory} was saved with {name}={stored!r}, but this {type(model).__name__} is quantized with "
            f"{name}={own!r}. A run goes on only as it began: quantize the model as the checkpoint was, or start a "
            "new run from its weights with from_pretrained."
        )

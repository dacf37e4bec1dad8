"""Seal a packed checkpoint with digests of all it holds, so that nothing but what was saved can be loaded.

The *seal* is one entry of the metadata that a safetensors file has in its header, the same in every shard. It is JSON:

    {"tensors": {name: digest}, "quantization_config": {field: value}, "config": {field: digest}}

A digest is the first 16 hexadecimal digits of a SHA-256: of type, shape and bytes of a tensor, or of the JSON of a
field of `config.json`. Both are needed: a flipped bit in packed codes gives other codes, which are just as valid;
another `activation_bits` or `hidden_act` in `config.json` gives another model from the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import EXPORT_RECORD, SAQQuantizationConfig

KEY = "hf_saq"
"""Name of the entry in the metadata."""
LABELS = {"id2label", "label2id"}
"""Fields of `config.json` that change no output: another value gives a warning, not an error."""
NOT_SEALED = {"quantization_config", "auto_map", "transformers_weights", EXPORT_RECORD}
"""Fields that are checked in another way, that transformers writes or drops while it saves, or that name an exported
graph beside the model, which may be put there later."""

IF_IN_FLOAT = (
    "If it is a float model that was built with the configuration of a quantized one, which transformers saves as it "
    "is, delete quantization_config from its config.json: it then loads as what it is."
)
"""What to do where a checkpoint that is said to be quantized has nothing that only such ones have."""

ADDED_LATER = {f.name: f.default for f in fields(SAQQuantizationConfig) if f.metadata.get("added_later")}
"""Fields that older files lack, and what they were: where a field that is not set is not `None`."""


def make_seal(
    tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, str]:
    """Make the metadata entry for a checkpoint.

    Args:
        tensors: Name in the file -> tensor.
        quantization_config: Its fields as `config.json` has them.
        config: The fields of `config.json`.
    """
    content = {
        "tensors": {name: digest_of_tensor(tensor) for name, tensor in tensors.items()},
        "quantization_config": quantization_config,
        "config": _digests_of_fields(config),
    }
    return {KEY: json.dumps(content, separators=(",", ":"))}


def check_seal(files: Sequence[str | Path], quantization_config: Mapping[str, Any] | None) -> None:
    """Raise unless `files` and the `config.json` next to them are what was saved together.

    Args:
        files: All weight files of a checkpoint.
        quantization_config: Its fields as `config.json` has them, or `None` if the checkpoint is said to be in float.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If a file is damaged or of another kind, if `quantization_config` is not that of the files, or if
            another field of `config.json` differs. Changed names of classes only give a warning.
    """
    paths = [Path(file) for file in files]
    packed = (quantization_config or {}).get("storage") == "packed"
    seals = {path: _read_seal(path, packed) for path in paths}
    if not packed and not any(seals.values()):
        return
    first = paths[0]
    for path, found in seals.items():
        if found is None:
            raise ValueError(
                f"{path}: the header has no {KEY!r} entry, which every file of a packed checkpoint has. It was not "
                "written by `save_pretrained` of a packed model, or rewritten since by something that drops metadata. "
                + ("" if any(seals.values()) else IF_IN_FLOAT)
            )
        if found != seals[first]:
            raise ValueError(f"{path}: its {KEY!r} entry is not that of {first.name}; they are of different saves.")
    seal = _parse(first, seals[first])
    _check_quantization(first, seal["quantization_config"], quantization_config)
    _check_tensors(paths, seal["tensors"])
    _check_config(first, seal["config"])


def digest_of_tensor(tensor: Tensor) -> str:
    """Compute the digest of type, shape and bytes of a tensor: 16 hexadecimal digits."""
    content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]


def _digests_of_fields(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for name, value in config.items()
        if name not in NOT_SEALED
    }


def _read_seal(path: Path, packed: bool) -> str | None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, a file of weights that the checkpoint is said to have.")
    if path.suffix != ".safetensors":
        if packed:
            raise ValueError(f"{path}: packed checkpoints are safetensors files; this one is not read.")
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} cannot be read ({error}). It is cut off or damaged; download or save it again."


def _parse(path: Path, entry: str | None) -> dict[str, dict[str, Any]]:
    parts = ("tensors", "quantization_config", "config")
    try:
        seal = json.loads(entry or "")
    except (ValueError, RecursionError):
        seal = None
    if not isinstance(seal, dict) or not all(isinstance(seal.get(part), dict) for part in parts):
        raise ValueError(f"{path}: the {KEY!r} entry of the header is damaged; expected JSON with {', '.join(parts)}.")
    return seal


def _check_quantization(path: Path, saved: dict[str, Any], given: Mapping[str, Any] | None) -> None:
    if given is None:
        raise ValueError(
            f"{path} holds packed integers, but config.json has no quantization_config; it is not that of the save."
        )
    given = json.loads(json.dumps(given))
    # Treat fields as not set that did not exist in the version that saved the file.
    for name, value in {**dict.fromkeys(given), **ADDED_LATER, **saved}.items():
        if given.get(name, ADDED_LATER.get(name)) != value:
            raise ValueError(
                f"config.json: quantization_config.{name} is {given.get(name)!r}, but {path} was saved with "
                f"{value!r}. Tensors and configuration do not belong together."
            )


def _check_tensors(paths: Sequence[Path], saved: dict[str, str]) -> None:
    found: dict[str, str] = {}
    owner: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    found[name], owner[name] = digest_of_tensor(file.get_tensor(name)), path
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(path, error)) from error
    # Compare contents where names differ: only one of tied tensors is stored, perhaps under the name of another one,
    # and `save_original_format=False` gives tensors other names.
    contents, saved_contents = set(found.values()), set(saved.values())
    for name, content in found.items():
        if saved.get(name, content) != content or (name not in saved and content not in saved_contents):
            raise ValueError(
                f"{owner[name]}: the tensor {name!r} is not the one that was saved; the file is damaged or was "
                "changed. Download or save it again."
            )
    for name, content in saved.items():
        if name not in found and content not in contents:
            raise ValueError(
                f"{paths[0]}: the tensor {name!r} is missing, or not the one that was saved; a file is damaged or was "
                "changed. Download or save it again."
            )


def _check_config(path: Path, saved: dict[str, str]) -> None:
    file = path.with_name("config.json")
    if not file.is_file():
        return  # the configuration comes from somewhere else
    found = _digests_of_fields(json.loads(file.read_text(encoding="utf-8")))
    changed = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
    wrong = [name for name in changed if name not in LABELS]
    if wrong:
        raise ValueError(
            f"{file}: {', '.join(wrong)} changed since {path.name} was saved (or the header of that file is damaged), "
            "so this would be another model. Take both files back; to change a packed model load it, change "
            "`model.config` and save it again."
        )
    if changed:
        warnings.warn(f"{file}: {', '.join(changed)} changed since {path.name} was saved.", stacklevel=2)

"""Read single tensors, and the sizes of tensors, from the weight files of a saved model, and find their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .saved_directory import read_json_object
from .weight_files import HINT, INDEX, ONE_FILE, is_index, is_model_file, is_weight_file, weight_files

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Name of a type in safetensors -> the type in torch."""


class StoredTensors:
    """Finds tensors by their names on disk; nothing is read before it is asked for.

    Attributes:
        sizes: Name of each weight file -> its bytes.

    Raises:
        ValueError: If there is no weight file or one of them cannot be read.
    """

    def __init__(self, directory: Path):
        files = weight_files(directory)
        _check_shards(directory, {file.name for file in files})
        if not files:
            raise ValueError(f"{directory} has no weight file (*.safetensors).{_other_forms(directory)}")
        self.sizes = {file.name: file.stat().st_size for file in files}
        self._where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._where |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read ({error}). It is cut off or damaged; get it again."
                ) from error

    @property
    def names(self) -> set[str]:
        """Return the names on disk of all tensors of the model."""
        return set(self._where) - {HINT}

    def kind_of(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Read the shape and the type of a tensor from the header of its file."""
        with safe_open(self._where[name], framework="pt") as opened:
            part = opened.get_slice(name)
            return torch.Size(part.get_shape()), _TYPES.get(part.get_dtype(), torch.float32)

    def tensor(self, name: str) -> Tensor | None:
        """Read one tensor; return `None` if no file has it."""
        if name not in self._where:
            return None
        with safe_open(self._where[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def bytes_of(self, name: str) -> int | None:
        """Read the size of a tensor in bytes from the header of its file; return `None` if no file has it."""
        if name not in self._where:
            return None
        shape, dtype = self.kind_of(name)
        return shape.numel() * dtype.itemsize


def _other_forms(directory: Path) -> str:
    """Say which files have weights in a form that only arguments of `from_pretrained` ask for, and what to do."""
    others = sorted(file.name for file in directory.glob("*") if is_weight_file(file.name) and not is_index(file.name))
    if not others:
        return ""
    return (
        f" Its {', '.join(others)} are of a variant or of an older format: load the model by from_pretrained, "
        "with the `variant` they are of, and save it without one."
    )


def _check_shards(directory: Path, there: set[str]) -> None:
    """Raise `ValueError` if a model in several files lacks its index, or one of the files that the index names."""
    index = directory / INDEX
    if ONE_FILE in there or not (index.is_file() or any(is_model_file(name) for name in there)):
        return
    if not index.is_file():
        raise ValueError(f"{directory} has a model in several files, but not {INDEX} for them; get it again.")
    listed = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(
            f"{index}: weight_map is {listed!r:.80}; expected tensors' names and their files. Get it again."
        )
    absent = sorted({name for name in listed.values() if name not in there or not is_model_file(name)})
    if absent:
        raise ValueError(f"{index} names weight files that are not there: {', '.join(absent)}. Get them again.")


def names_on_disk(model: nn.Module) -> dict[str, str] | None:
    """Map names of tensors in a model to those in its file; transformers saves some architectures under older names.

    Returns:
        Name in the model -> name in the file; `None` if transformers also stores tensors in another form.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in state}
    names = {id(tensor): name for name, tensor in state.items()}
    renamed = revert_weight_conversion(model, dict(state))
    if any(id(tensor) not in names for tensor in renamed.values()):
        return None
    return {names[id(tensor)]: name for name, tensor in renamed.items()}


def names_there(model: nn.Module, stored: StoredTensors) -> dict[str, str] | None:
    """Map names of tensors in a model to those that `stored` may have them under, as [`names_on_disk`].

    A model that was loaded from a file with other names saves under those again, so both kinds are tried.
    """
    where = names_on_disk(model)
    if where is None:
        return None
    same = {name: name for name in model.state_dict(keep_vars=True)}
    return max((where, same), key=lambda scheme: len(stored.names.intersection(scheme.values())))


def tensor_with_other_values(model: nn.Module, directory: Path) -> str | None:
    """Name a tensor of `model` that the weight files of `directory` have with other values.

    Tensors that one of the two stores in another form, as packed codes are, or in another type are not compared. If
    there is nothing to compare, the first one is named.

    Returns:
        `None`: there is none, or transformers stores the tensors of such models in a form of its own.
    """
    stored = StoredTensors(directory)
    names, compared, state = names_there(model, stored), False, model.state_dict()
    if names is None:
        return None
    for name, tensor in state.items():
        source = names.get(name)
        if source in stored.names and stored.kind_of(source) == (tensor.shape, tensor.dtype):
            compared, found = True, stored.tensor(source)
            # Scales are not numbers before calibration.
            if found is not None and not torch.allclose(found, tensor.cpu(), rtol=0, atol=0, equal_nan=True):
                return name
    return None if compared else next(iter(state), None)

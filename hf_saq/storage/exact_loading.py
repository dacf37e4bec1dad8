"""Load a saved state into the model that goes on from it: every tensor, unchanged, by the names of that model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .stored_tensors import StoredTensors, names_there


def load_exactly(model: nn.Module, directory: str | Path) -> None:
    """Load the tensors saved in `directory` into `model`, in place.

    No second model is built, so the class may have any constructor, and layers may have been replaced since the save.
    (Only where transformers stores tensors in another form, it builds a second model to read them.)
    Nothing is loaded unless all of it fits.

    Raises:
        ValueError: If a tensor is missing, is left over, has another shape, or a type that the model's cannot hold.
    """
    stored = StoredTensors(Path(directory))
    state = model.state_dict(keep_vars=True)
    names = names_there(model, stored)
    if names is None:  # the file has another form, which only transformers can turn into this one
        assert isinstance(model, PreTrainedModel)
        model.load_state_dict(type(model).from_pretrained(directory, dtype=model.dtype).state_dict())
        return
    found = _with_tied(state, {name: names[name] for name in state if names.get(name) in stored.names})
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [name for name in state if name not in found and name not in left_out]
    left_over = sorted(stored.names.difference(found.values()))
    if missing or left_over:
        raise ValueError(
            f"{directory} is not a checkpoint of this {type(model).__name__}: it lacks {_count(missing)} of the "
            f"model, and the model does not have {_count(left_over)} of it. Resume with a model built and quantized "
            "as the one that was saved."
        )
    for name, source in found.items():
        shape, dtype = stored.kind_of(source)
        if shape != state[name].shape or torch.promote_types(dtype, state[name].dtype) != state[name].dtype:
            raise ValueError(
                f"{directory}: {source} is {dtype} of shape {tuple(shape)}, but {name} of this {type(model).__name__} "
                f"is {state[name].dtype} of shape {tuple(state[name].shape)}. Resume with a model built and loaded as "
                "the one that was saved."
            )
    values: dict[str, Any] = {name: stored.tensor(source) for name, source in found.items()}
    model.load_state_dict({**state, **values}, strict=True)


def _with_tied(state: Mapping[str, Tensor], found: dict[str, str]) -> dict[str, str]:
    """Add to `found` the names of tied tensors: of several names of one tensor in the model, only one is stored."""
    by_tensor = {id(state[name]): source for name, source in found.items()}
    return {
        name: found.get(name, by_tensor.get(id(tensor), ""))
        for name, tensor in state.items()
        if name in found or id(tensor) in by_tensor
    }


def _count(names: list[str]) -> str:
    listed = f" (for example {', '.join(names[:3])})" if names else ""
    return f"{len(names)} tensor(s){listed}"

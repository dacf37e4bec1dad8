"""See which layers of a model are given the same tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...layers.float_form import HOOKS
from ...layers.shared_input import version_of
from .image_size import image_channels, image_size

USUAL_SIZE = (224, 224)
"""Height and width in pixels of images for models that do not say what they take, since they take any."""


class Found(NamedTuple):
    """Holds groups of names of layers that read the same tensor, and, where there are none, why not."""

    groups: list[list[str]]
    why_none: str = ""


def readers_of_the_same_tensor(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Run a model, and group the names of `layers` by the tensor they are given, in the order in which they run.

    Args:
        layers: Modules of the model by name.
        run: Runs it once.

    Returns:
        Groups of two or more names. A layer that runs several times may be in more than one of them.
    """
    return _grouped(_tensors_read(layers, run))


def _tensors_read(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, list[Any]]:
    """Run a model, and list for each layer the tensors it is given, one written to in between as another one."""
    found: dict[str, list[Any]] = {}
    kept: list[Tensor] = []  # alive until the end, so that no other tensor gets the same identity

    def note(name: str):
        def before(layer: nn.Module, args: tuple) -> None:  # noqa: ARG001 (a forward hook)
            if args and isinstance(args[0], Tensor):
                kept.append(args[0])
                found.setdefault(name, []).append(version_of(args[0]))

        return before

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _grouped(tensors_read: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    readers: dict[Any, list[str]] = {}
    for name, tensors in tensors_read.items():
        for tensor in dict.fromkeys(tensors):
            readers.setdefault(tensor, []).append(name)
    return [names for names in readers.values() if len(names) > 1]


def find_shared_inputs(model: nn.Module, names: Sequence[str]) -> Found:
    """Group the layers called `names` by the tensor they read, without computing anything.

    A copy of the model without memory, in evaluation mode and without its hooks, runs on images of the size that its
    configuration names. What dropout and the like return counts as another tensor than what they were given, as in
    training; one that a model calls as a function is not seen. Layers that run more than once are in no group.
    """
    try:
        bare = _without_memory(model)
        for module in bare.modules():
            if not (any(True for _ in module.children()) or isinstance(module, nn.Identity)):
                module.register_forward_hook(_as_another_tensor)
        layers = {name: bare.get_submodule(name) for name in names}
        with torch.no_grad():
            tensors_read = _tensors_read(layers, lambda: bare(_images(bare)))
    except Exception as error:  # whatever a model may raise that cannot run without values
        return Found([], f"it could not be run on shapes alone ({type(error).__name__}: {str(error)[:200]})")
    groups = _grouped({name: tensors for name, tensors in tensors_read.items() if len(tensors) == 1})
    return Found(groups, "" if groups else "no two of its layers read the same tensor")


def _without_memory(model: nn.Module) -> nn.Module:
    """Copy `model` onto the meta device, without the hooks of its user, which are not asked to run."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta"), tensor.requires_grad) if is_parameter else tensor.to("meta")
        for tensors, is_parameter in ((model.parameters(), True), (model.buffers(), False))
        for tensor in tensors
    }
    bare = copy.deepcopy(model, memo).eval()
    for module in bare.modules():
        for hooks in HOOKS:
            if isinstance(vars(module)[hooks], dict):
                vars(module)[hooks].clear()
    return bare


def _images(model: nn.Module) -> Tensor:
    """Make two images without values: of the size, channels and type that `model` takes, as far as it says so."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(2, image_channels(model), *(image_size(model) or USUAL_SIZE), dtype=dtype, device="meta")


def _as_another_tensor(module: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ARG001 (a forward hook)
    return output.view_as(output) if args and output is args[0] and isinstance(output, Tensor) else None

"""See which layers of a model are given the same tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.float_form import HOOKS
from .image_size import image_shape

USUAL_SHAPE = (3, 224, 224)
"""Of images for models that do not say what they take: those that take any size take this one."""


def readers_of_the_same_tensor(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Run a model, and group the names of `layers` by the tensor they are given, in the order in which they run.

    Args:
        layers: Modules of the model by name.
        run: Runs it once.

    Returns:
        Groups of two or more names. A layer that runs several times may be in more than one of them.
    """
    readers: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # alive until the end, so that no other tensor gets the same identity

    def note(name: str):
        def before(layer: nn.Module, args: tuple) -> None:  # noqa: ARG001 (a forward hook)
            if args and isinstance(args[0], Tensor):
                kept.append(args[0])
                names = readers.setdefault(id(args[0]), [])
                if name not in names:
                    names.append(name)

        return before

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [names for names in readers.values() if len(names) > 1]


def find_shared_inputs(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Group the layers called `names` by the tensor they read, without computing anything.

    A copy of the model without memory, in evaluation mode and without its hooks, runs on images of the size that its
    configuration names. Where that is not possible, because it is no image model or because its control flow depends
    on values, no groups are found.
    """
    try:
        # Stand in for each tensor by one of its shape without memory.
        memo: dict[int, Any] = {
            id(tensor): nn.Parameter(tensor.to("meta"), tensor.requires_grad) if is_parameter else tensor.to("meta")
            for tensors, is_parameter in ((model.parameters(), True), (model.buffers(), False))
            for tensor in tensors
        }
        bare = copy.deepcopy(model, memo).eval()
        for module in bare.modules():
            for hooks in HOOKS:
                if isinstance(vars(module)[hooks], dict):
                    vars(module)[hooks].clear()  # they are those of the user, and not asked to run
        images = torch.empty(2, *(image_shape(model) or USUAL_SHAPE), device="meta")
        layers = {name: bare.get_submodule(name) for name in names}
        with torch.no_grad():
            groups = readers_of_the_same_tensor(layers, lambda: bare(images))
    except Exception:  # whatever a model may raise that cannot run without values
        return []
    uses = [name for group in groups for name in group]
    return [group for group in groups if all(uses.count(name) == 1 for name in group)]

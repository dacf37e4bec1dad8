"""Remember a float layer, so that a quantized one can become it again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from .wrapping import is_function

_OF_EVERY_MODULE = set(vars(nn.Module()))
HOOKS = tuple(name for name in vars(nn.Module()) if "_hook" in name)
"""Attributes of a module that hold its hooks."""


@dataclass(frozen=True)
class FloatForm:
    """Holds the class of a float layer and what its constructor left on it, without its tensors and hooks."""

    kind: type[nn.Module]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, layer: nn.Module) -> FloatForm:
        own = {name: value for name, value in vars(layer).items() if name not in _OF_EVERY_MODULE}
        # A function on the instance runs the layer it was made for, which would live on behind this one.
        return cls(type(layer), {name: value for name, value in own.items() if not is_function(value)})

    def build(self, weight: nn.Parameter, like: nn.Module) -> nn.Module:
        """Build the float layer around `weight`, with the bias, the hooks and the mode of the layer `like`."""
        # Not by calling the class: the constructor of a subclass may take anything.
        layer = self.kind.__new__(self.kind)
        nn.Module.__init__(layer)
        vars(layer).update(copy.deepcopy(self.attributes))
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", like.bias)  # type: ignore[arg-type]
        take_over_hooks(layer, like)
        return layer.train(like.training)


def take_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let the hooks of `old` run on `new`; handles that were given out for them still remove them."""
    vars(new).update({name: vars(old)[name] for name in HOOKS})

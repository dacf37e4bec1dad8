"""What `torch.fx` sees of a layer: one call, as of a layer of torch.

Tracers take the layers of torch for leaves, and run the forward of all others with symbols in place of tensors, which
have no types and no strides to decide by. torchvision and timm make their feature extractors that way.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def is_symbol(x: Any) -> bool:
    """Whether a tracer of `torch.fx` passes `x` in place of a tensor."""
    return isinstance(x, Proxy)


def call_in_graph(layer: nn.Module, x: Any) -> Any:
    """Note a call of `layer` in the graph that is being traced; returns the symbol of its output."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})

"""Keep the running statistics of normalization layers, and what other modules remember, while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .buffer_state import BufferState, has_running_statistics


def _places(model: nn.Module) -> list[tuple[nn.Module, str, Tensor | None]]:
    """List module, name and tensor of the buffers that a training forward updates: beside a `running_*` one."""
    modules = [module for module in model.modules() if has_running_statistics(module)]
    return [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]


@contextmanager
def frozen_norm_statistics(model: nn.Module, begins_with: BufferState | None = None) -> Iterator[None]:
    """Let the block normalize with batch statistics as usual, then put the running statistics back.

    It copies the buffers and sets no flag on the modules. This is exact for any implementation that follows the
    naming, and the graph that `torch.compile` or a checkpointed recomputation sees does not change. All other buffers
    that the block changes are put back as well.

    Args:
        begins_with: If given, the block finds these other buffers as they were then.
    """
    places, others = _places(model), BufferState(model)
    saved = [None if buffer is None else buffer.clone() for _, _, buffer in places]
    if begins_with is not None:
        begins_with.restore()
    try:
        yield
    finally:
        others.restore()
        with torch.no_grad():
            for (module, name, buffer), value in zip(places, saved, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
                if module._buffers.get(name) is not buffer:  # a norm may put another tensor there instead
                    module._buffers[name] = buffer

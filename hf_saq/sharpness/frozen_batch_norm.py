"""Keep the running statistics of normalization layers, and what other modules remember, while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .buffer_state import BufferState, has_running_statistics


def running_statistics(model: nn.Module) -> list[Tensor]:
    """List the buffers that a training forward updates: all buffers of modules with a `running_*` one (BatchNorm)."""
    return [
        buffer
        for module in model.modules()
        if has_running_statistics(module)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


@contextmanager
def frozen_norm_statistics(model: nn.Module, begins_with: BufferState | None = None) -> Iterator[None]:
    """Let the block normalize with batch statistics as usual, then put the running statistics back.

    It copies the buffers and sets no flag on the modules. This is exact for any implementation that follows the
    naming, and the graph that `torch.compile` or a checkpointed recomputation sees does not change. All other buffers
    that the block changes are put back as well.

    Args:
        begins_with: If given, the block finds these other buffers as they were then.
    """
    buffers, others = running_statistics(model), BufferState(model)
    saved = [buffer.clone() for buffer in buffers]
    if begins_with is not None:
        begins_with.restore()
    try:
        yield
    finally:
        others.restore()
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)

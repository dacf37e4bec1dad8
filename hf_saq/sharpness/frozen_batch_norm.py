"""Keep the running statistics of normalization layers as they are while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def has_running_statistics(module: nn.Module) -> bool:
    """Tell whether `module` itself, without those inside of it, has a buffer that a training forward updates."""
    return any(name.startswith("running_") for name in module._buffers)


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
def frozen_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Let the block normalize with batch statistics as usual, then put the running statistics back.

    It copies the buffers and sets no flag on the modules. This is exact for any implementation that follows the
    naming, and the graph that `torch.compile` or a checkpointed recomputation sees does not change.
    """
    buffers = running_statistics(model)
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)

"""Running statistics of normalization layers, kept as they are while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers that a training forward updates: those of modules that keep a `running_*` buffer (BatchNorm's way)."""
    return [
        buffer
        for module in model.modules()
        if any(name.startswith("running_") for name in module._buffers)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


@contextmanager
def frozen_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Let the block normalize with batch statistics as usual, then put the running statistics back.

    Copies rather than a flag on the modules: exact for any implementation that follows the naming, and the graph that
    `torch.compile` or a checkpointed recomputation sees does not change.
    """
    buffers = running_statistics(model)
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)

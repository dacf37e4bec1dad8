"""Bytes of tensors that are alive at once, counted operator by operator where the device keeps no count itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operators return inside of the block, and those given, for as long as they live.

    Workspace inside of a single operator is not seen.

    Args:
        resident: Tensors that are there already and stay: parameters, buffers, the state of an optimizer.

    Attributes:
        peak (`int`): Most bytes alive at once, the resident ones included.
    """

    def __init__(self, resident: Iterable[Tensor] = ()):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in resident:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result


def peak_bytes(steps: Callable[[], object], resident: Iterable[Tensor], device: torch.device) -> int:
    """Most bytes alive at once during `steps`, with all that is resident. On CUDA those of the allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with LiveTensors(resident) as live:
        steps()
    return live.peak

"""Save what modules keep in buffers and change in a forward, so that a second pass neither sees nor repeats it.

The running statistics of norms have a file of their own, `frozen_batch_norm.py`. Others keep a queue of features, the
centre of a teacher's answers, the vectors of a power iteration: changed twice in a step they would follow the
perturbation, and a second pass would find its own images in the queue. Frozen parameters that follow others in a
forward, as those of a momentum encoder do, would take two steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer


def has_running_statistics(module: nn.Module) -> bool:
    """Tell whether `module` itself, without those inside of it, has a buffer that a training forward updates."""
    return any(name.startswith("running_") for name in module._buffers)


class _Saved(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor | None
    version: int
    value: Tensor | None


class BufferState:
    """Holds the buffers of a model at the moment it is made, without those of norms and of quantizers.

    And the tensors behind frozen parameters, which are not copied: a new tensor that a forward puts in the place of
    one, `p.data = m * p.data + (1 - m) * q.data`, is taken back; a change of the tensor itself is not.

    Args:
        model: Modules may change these buffers in place or put others in their place.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        self._saved = [
            _Saved(module, name, buffer, _version(buffer), None if buffer is None else buffer.clone())
            for module in model.modules()
            if not isinstance(module, Quantizer) and not has_running_statistics(module)
            for name, buffer in module._buffers.items()
        ]
        frozen = [p for p in model.parameters() if not p.requires_grad and type(p) is nn.Parameter]
        self._frozen = [(p, p.data) for p in frozen if type(p.data) is Tensor]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back, bit for bit, what has been changed since; autograd may still need the others as they are."""
        for module, name, buffer, version, value in self._saved:
            if buffer is not None and value is not None and _version(buffer) != version:
                buffer.copy_(value)
            elif buffer is not None and value is not None and _can_be_written(buffer):
                # A module may have written through `.data`, as old codebooks do, which changes no version. Write the
                # same way: where nothing was changed, autograd is not to notice.
                buffer.data.copy_(value)
            if name in module._buffers and module._buffers[name] is not buffer:
                module._buffers[name] = buffer
        for p, tensor in self._frozen:
            if p.data.data_ptr() != tensor.data_ptr() and _are_alike(p.data, tensor):
                p.data = tensor


def _can_be_written(buffer: Tensor) -> bool:
    """Tell whether elements have places of their own in memory, as those of an expanded tensor have not."""
    own_places = all(stride > 0 for stride, size in zip(buffer.stride(), buffer.shape, strict=True) if size > 1)
    return own_places and type(buffer) is Tensor and not buffer.is_inference()


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _version(buffer: Tensor | None) -> int:
    return -1 if buffer is None or buffer.is_inference() else buffer._version

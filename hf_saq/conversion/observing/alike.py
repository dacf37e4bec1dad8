"""Make calibration end alike on all processes: what the first one found holds for each, also under FSDP2."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...quantizers import Quantizer


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_over_processes(tensors: list[Tensor]) -> None:
    """Replace each plain tensor by its sum over all processes, in place."""
    for tensor in tensors if several_processes() else ():
        dist.all_reduce(tensor)


def names_of_first_process(names: list[str]) -> list[str]:
    """Give every process the `names` that the first one has."""
    if not several_processes():
        return names
    shared = [names]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def reshard(model: nn.Module) -> None:
    """Let parameters be the shards that last: FSDP2 leaves the outermost ones whole after a forward."""
    if several_processes():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def fit_alike(samples: Iterable[tuple[Quantizer, Tensor, float]]) -> None:
    """Initialize each quantizer from its sample and the smallest value seen; values and signs are those of the first
    process."""
    fitted: list[tuple[Quantizer, Quantizer]] = []
    for quantizer, sample, minimum in samples:
        own = quantizer
        if any(_is_sharded(p) for p in quantizer.parameters()):  # nothing is fitted in shards
            with sample.device:
                own = quantizer.blank_copy()
        own.initialize(sample, minimum=minimum)
        fitted.append((quantizer, own))
    if not several_processes() or not fitted:
        return
    values = [t.reshape(-1).double() for _, own in fitted for t in (*own.parameters(), *own.buffers())]
    flat = torch.cat(values)
    dist.broadcast(flat, src=0)
    arrived = iter(flat.split([len(v) for v in values]))
    for quantizer, own in fitted:
        for parameter, whole in zip(quantizer.parameters(), own.parameters(), strict=True):
            _write(parameter, next(arrived).reshape(whole.shape).to(whole.dtype))
        for buffer, of_own in zip(quantizer.buffers(), own.buffers(), strict=True):  # the state among them
            buffer.copy_(of_own.copy_(next(arrived).reshape(of_own.shape)))
        quantizer.take_state(own.signed)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _write(parameter: Tensor, value: Tensor) -> None:
    if _is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)

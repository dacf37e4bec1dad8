"""Handle tensors that FSDP2 shards over processes like plain ones, as far as a perturbed step needs it.

Outside of forward and backward the parameters of a model under `fully_shard`, and their gradients, are DTensors of
which each process holds a part; gradients are already averaged over processes. A quantizer's output and `g_q` are
plain and whole on each process, `g_q` of its own batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..quantizers import Quantizer
from .perturbed_tensors import QuantizedWeight


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether `tensor` is a DTensor, of which each process holds a part."""
    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on each process; communicates if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(like: Tensor, part: Tensor) -> Tensor:
    """Build a tensor that is sharded as `like` and has `part` on this process; it is on the device of `like`."""
    part = part.to(like.device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def quantized(entry: QuantizedWeight) -> Tensor:
    """Compute the whole `Q(w)`, in the shape of `w` and in memory of its own."""
    if not is_sharded(entry.weight):
        return entry.quantizer.fake_quantize(entry.weight)
    whole = {f"q.{name}": full(p) for name, p in entry.quantizer.named_parameters()}
    return torch.func.functional_call(_FakeQuantize(entry.quantizer), whole, (full(entry.weight),))


class _FakeQuantize(nn.Module):
    """Runs a quantizer without its hooks."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        self.q: Quantizer = quantizer

    def forward(self, w: Tensor) -> Tensor:
        return self.q.fake_quantize(w)


def several_processes() -> bool:
    """Tell whether other processes take part; builds of torch without `torch.distributed` know nothing of it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each plain tensor by its mean over all processes."""
    if not tensors or not several_processes():
        return
    pending = [dist.all_reduce(t, async_op=True) for t in tensors]
    for work in pending:
        work.wait()
    torch._foreach_div_(tensors, dist.get_world_size())


def averaged(number: Tensor) -> Tensor:
    """Return the mean of a 0-d `number` over all processes in float64, the same to the last bit on each."""
    number = precise(number.detach().clone())
    average_over_processes([number])
    return number


def of_first_process(text: str | None) -> str | None:
    """Return the text that the first process has."""
    found = [text]
    if several_processes():
        dist.broadcast_object_list(found)
    return found[0]


def precise(number: Tensor) -> Tensor:
    """Convert to float64, where the device has it."""
    return number if number.device.type == "mps" else number.double()


def global_norms(plain: Sequence[Tensor], sharded: Sequence[Tensor], *also: Tensor) -> list[float]:
    """Compute two L2 norms over both lists: one for this process's `plain` tensors, one for all processes' shards.

    The second must be the same everywhere, also where each process has plain tensors of its own: it is the root mean
    square of the first over processes. Where all have the same, or nothing is sharded, the two are equal.

    Args:
        also: 0-d tensors to read back from the device together with the norms.

    Returns:
        Both norms, then the numbers in `also`.
    """
    own = precise(norm(plain))
    if sharded:
        shards = precise(norm(sharded))
        own = own.to(shards)
        mean_square = averaged(own**2)
        both = [torch.hypot(own, shards), torch.hypot(mean_square.sqrt(), shards)]
    else:
        both = [own, own]
    return torch.stack([*both, *(number.to(both[0]) for number in also)]).tolist()


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute one L2 norm over all elements, a 0-d tensor; all of `tensors` are sharded or none is."""
    if not tensors:
        return torch.zeros(())
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    norms: list[Tensor] = []
    for (_, dtype), group in alike.items():
        wide = torch.promote_types(dtype, torch.float32)  # in half precision a sum of squares overflows
        if is_sharded(group[0]):  # DTensor has no `_foreach_norm` with a dtype
            norms += [torch.linalg.vector_norm(t, dtype=wide) for t in group]
        else:
            norms += torch._foreach_norm(group, 2, dtype=wide)
    return full(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def reshard(model: nn.Module) -> None:
    """Make `model.parameters()` the sharded ones, which the optimizer updates and the next forward gathers.

    Without this, the outermost ones stay whole after a forward without a backward, such as an evaluation.
    """
    for module in _units(model):
        module.reshard()


def reduce_gradients(model: nn.Module) -> None:
    """Undo `no_sync`: gradients that are not reduced yet are hidden, and would mix with those of the next pass."""
    for module in _units(model):
        module.set_requires_gradient_sync(True, recurse=False)


def check_gradients_are_reduced(model: nn.Module) -> None:
    """Raise `RuntimeError` if a backward under `no_sync` left gradients that would mix with those of this pass."""
    for module in _units(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            if getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None:
                raise RuntimeError(
                    f"{parameter._param_fqn}: an earlier backward under FSDP2's no_sync left a gradient that is not "
                    "reduced. Run every micro-batch of a perturbed step through `minimizer.ascent()` and "
                    "`minimizer.perturbed()`, or the plain ones outside of no_sync."
                )


def check_whole(model: nn.Module, what: str) -> None:
    """Raise `ValueError` if `model` is sharded: `what` reads gradients of single processes as they are computed."""
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"{what} under FSDP2, where gradients of parameters exist only averaged over processes and in shards. Use "
            'DDP, or a schedule of interval, start, ascent_fraction and reuse="stale".'
        )


def check_parallelism(model: nn.Module, case: int, sync: str) -> None:
    """Raise `ValueError` if parameters of `model` are sharded in a way that rules out this case and `sync`."""
    if not any(is_sharded(p) for p in model.parameters()):
        return
    if not _units(model):
        raise ValueError(
            f"{type(model).__name__} has DTensor parameters that FSDP2 does not manage, as tensor parallelism makes "
            "them. Use DDP or FSDP2 (`torch.distributed.fsdp.fully_shard`)."
        )
    if case != 3 and sync == "local":
        raise ValueError(
            f'case={case} with sync="local" under FSDP2: the gradients of latent weights exist only averaged over '
            'processes and in shards. Pass sync="global", or use case=3.'
        )


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]

"""Which gradients of parameters one backward computes, and how they are seen before anything is done with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from . import sharding


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter], but: Collection[nn.Parameter]) -> Iterator[None]:
    """Keep autograd from computing gradients of `parameters` other than those in `but`.

    FSDP2 looks at `requires_grad` only once, so nothing is switched where parameters are sharded.
    """
    off = [p for p in parameters if p.requires_grad and p not in but and not sharding.is_sharded(p)]
    for p in off:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in off:
            p.requires_grad_(True)


@contextmanager
def recorded_gradients(parameters: Iterable[nn.Parameter], into: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Add to `into` what each backward inside of the block adds to `p.grad`: before DDP averages it over processes."""

    def record(p: nn.Parameter, grad: Tensor) -> None:
        into[p] = grad.clone() if p not in into else into[p].add_(grad)

    handles = [p.register_hook(partial(record, p)) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

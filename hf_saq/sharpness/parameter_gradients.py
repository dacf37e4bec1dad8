"""Choose which gradients of parameters one backward computes, and where they go."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
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
def set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the block start without gradients; afterwards `p.grad` is what it was before, whatever the block left."""
    earlier = {p: p.grad for p in parameters}
    for p in earlier:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in earlier.items():
            p.grad = grad


def add_gradients(
    parameters: Iterable[nn.Parameter],
    to: dict[nn.Parameter, Tensor],
    apart_from: Mapping[nn.Parameter, Tensor] | None = None,
) -> None:
    """Add `p.grad` of each parameter to the sums in `to`; the first one is taken itself rather than copied.

    Args:
        apart_from: Gradients that are used otherwise and will change: what is one of them is copied.
    """
    for p in parameters:
        if p.grad is None:
            continue
        if p in to:
            to[p].add_(p.grad)
        else:
            to[p] = p.grad.clone() if apart_from is not None and apart_from.get(p) is p.grad else p.grad


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

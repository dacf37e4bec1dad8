"""Choose which gradients of parameters one backward computes, and where they go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from . import sharding


@contextmanager
def without_gradients(
    parameters: Iterable[nn.Parameter], but: Collection[nn.Parameter]
) -> Iterator[list[nn.Parameter]]:
    """Keep autograd from computing gradients of `parameters` other than those in `but`.

    FSDP2 looks at `requires_grad` only once, so sharded parameters are not switched.

    Yields:
        The parameters that were switched off.
    """
    off = [p for p in parameters if p.requires_grad and p not in but and not sharding.is_sharded(p)]
    for p in off:
        p.requires_grad_(False)
    try:
        yield off
    finally:
        for p in off:
            p.requires_grad_(True)


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the block start without gradients; afterwards put back what `p.grad` was before, whatever the block left."""
    earlier = {p: p.grad for p in parameters}
    for p in earlier:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in earlier.items():
            p.grad = grad


def check_nothing_steps_inside_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Raise `RuntimeError` if a hook runs as soon as a gradient is complete.

    Optimizers that step inside of backward use such hooks. The first of two passes would then move the model, and
    nothing could undo that.
    """
    for p in parameters:
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                "A parameter has a post-accumulate-grad hook, as optimizers have that step inside of backward "
                "(layer-wise GaLore and APOLLO, fused updates of your own): the first pass of a perturbed step would "
                "move the model. Use an optimizer whose step() is called after backward, or plain quantization-aware "
                "training (SAQConfig(case=None), no minimizer)."
            )


class ClearingWatch(ABC):
    """Notices a `zero_grad` inside of a first pass, of a module or an optimizer, and calls all `followers`.

    A loss that runs a backward of its own (adversarial training) clears the gradients of parameters after it; then
    the gradients at quantized weights must be cleared too.
    """

    def __init__(self) -> None:
        self.followers: list[Callable[[], None]] = []

    def check(self) -> None:
        """Call all followers if the gradients of parameters were cleared since the last check."""
        if self._was_cleared():
            for follow in self.followers:
                follow()
            self._start_again()

    @abstractmethod
    def _was_cleared(self) -> bool: ...

    @abstractmethod
    def _start_again(self) -> None: ...


class Mark(ClearingWatch):
    """Watches a parameter for which the pass computes no gradient: a mark is put in the place of its gradient.

    `zero_grad` removes or changes the mark. [`set_aside`] around the pass removes it at the end.
    """

    def __init__(self, idle: Iterable[nn.Parameter]):
        super().__init__()
        self._parameter = min(idle, key=lambda p: p.numel(), default=None)
        self._start_again()

    def _start_again(self) -> None:
        if self._parameter is not None:
            self._mark = self._parameter.grad = torch.ones_like(self._parameter)
            self._version = self._mark._version

    def _was_cleared(self) -> bool:
        if self._parameter is None:
            return False
        return self._parameter.grad is not self._mark or self._mark._version != self._version


def add_gradients(
    parameters: Iterable[nn.Parameter],
    to: dict[nn.Parameter, Tensor],
    apart_from: Mapping[nn.Parameter, Tensor] | None = None,
) -> None:
    """Add `p.grad` of each parameter to the sums in `to`; the first gradient is stored there without a copy.

    Args:
        apart_from: Gradients that are used elsewhere and will change; these are copied.
    """
    for p in parameters:
        if p.grad is None:
            continue
        if p in to:
            to[p].add_(p.grad)
        else:
            to[p] = p.grad.clone() if apart_from is not None and apart_from.get(p) is p.grad else p.grad


class Recorder(ClearingWatch):
    """Adds up what each backward adds to `p.grad`, as it arrives: before DDP averages it over processes."""

    def __init__(self, into: dict[nn.Parameter, Tensor]):
        super().__init__()
        self._into = into
        self._latest: nn.Parameter | None = None

    def record(self, p: nn.Parameter, grad: Tensor) -> None:
        """Add to the sums a gradient that autograd is about to add to `p.grad`."""
        self.check()
        self._latest = p
        self._into[p] = grad.clone() if p not in self._into else self._into[p].add_(grad)

    def _was_cleared(self) -> bool:
        # Look at the gradient that arrived last: it was added to `p.grad` right after it had arrived.
        return self._latest is not None and self._latest.grad is None

    def _start_again(self) -> None:
        self._into.clear()
        self._latest = None


@contextmanager
def recorded_gradients(parameters: Iterable[nn.Parameter], into: dict[nn.Parameter, Tensor]) -> Iterator[Recorder]:
    """Add to `into` what each backward inside of the block adds to `p.grad`, see [`Recorder`]."""
    recorder = Recorder(into)
    handles = [p.register_hook(partial(recorder.record, p)) for p in parameters if p.requires_grad]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()

"""Connect quantization and sharpness at the output `w_q` of every weight quantizer: catch gradients, add `eps`.

In a first pass a zero leaf is added there. After its backward the gradient of that leaf is `g_q`, the gradient at the
quantized weight before any clip mask. Scaled in place, the same memory becomes the `eps` of the second pass. Layers do
not know of this. (`retain_grad` on `w_q` would not be enough: the gradient is `None` under gradient checkpointing, and
only that of the last use is kept if a layer runs twice.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from ..quantizers.straight_through import asks_for_operations
from . import sharding
from .displacement import Displacement
from .parameter_gradients import ClearingWatch
from .perturbed_tensors import QuantizedWeight
from .rounding import RoundingCheck


class _CatchGradient(torch.autograd.Function):
    """Computes `w_q + eps` for `eps = 0` without the addition; the backward hands the gradient to both."""

    @staticmethod
    def forward(ctx, w_q: Tensor, eps: Tensor) -> Tensor:  # noqa: ARG004 (autograd's signature)
        return w_q.view_as(w_q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad if ctx.needs_input_grad[0] else None, grad


class Seam:
    """Holds hooks on weight quantizers that catch gradients at their outputs, add `eps` to the outputs, or both.

    Attributes:
        leaves: Quantizer whose gradient is wanted -> the zero leaf behind it, whose `.grad` is `g_q`.
        rounding: Checks, in the first perturbed pass, whether rounding swallows what is added.
        is_in_a_pass: Whether a pass of the minimizer is under way.
    """

    def __init__(self) -> None:
        # Refer weakly: the model holds its hooks, and these would keep alive whoever uses them.
        self._owner: weakref.ref[object] | None = None
        self.leaves: dict[Quantizer, Tensor] = {}
        self.rounding = RoundingCheck()
        self._added: Mapping[Quantizer, Tensor] = {}
        self.is_in_a_pass = False
        self._watched: nn.Module | None = None
        self._watching: torch.utils.hooks.RemovableHandle | None = None
        self._catches, self._passes_on = False, True
        self._handles: dict[Quantizer, torch.utils.hooks.RemovableHandle] = {}

    # Copying or pickling a model copies its hooks. They come with a seam that does nothing: nobody watches the copy.

    def __deepcopy__(self, memo: dict) -> Seam:
        return Seam()

    def __reduce__(self) -> tuple[type[Seam], tuple[()]]:
        return Seam, ()

    def let_go(self) -> None:
        """Remove all hooks."""
        if self._watching is not None:
            self._watching.remove()
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def attach(self, quantizers: Iterable[Quantizer], model: nn.Module, owner: object) -> None:
        """Put hooks on these quantizers of `model`, where they are not there still, and remove them from all others.

        Each forward of `model` inside of a pass reduces gradients from then on, where they are sharded. When `owner`
        is gone, the next seam at the same places removes what is left: a model may see a minimizer for each trial.
        """
        self._owner = weakref.ref(owner)
        if self._watching is None or self._watching.id not in model._forward_pre_hooks:
            self._watched, self._watching = model, model.register_forward_pre_hook(self._before_forward)
        _remove_abandoned(model._forward_pre_hooks)
        wanted = dict.fromkeys(quantizers)
        for quantizer in [q for q in self._handles if q not in wanted]:
            self._handles.pop(quantizer).remove()
        for quantizer in wanted:
            handle = self._handles.get(quantizer)
            if handle is None or handle.id not in quantizer._forward_hooks:
                self._handles[quantizer] = quantizer.register_forward_hook(self._hook)
            _remove_abandoned(quantizer._forward_hooks)

    @property
    def is_abandoned(self) -> bool:
        """Tell whether nobody uses the hooks any more."""
        return self._owner is None or self._owner() is None

    def place_leaves(self, weights: Iterable[QuantizedWeight]) -> None:
        """Put a zero leaf behind every quantizer before the forward, so that compiled code finds it ready."""
        for entry in weights:
            # Expand one element: a zero of the weight's shape then takes no memory. Only its gradient does.
            zero = torch.zeros((), dtype=entry.weight.dtype, device=entry.weight.device)
            if entry.quantizer not in self.leaves:
                leaf = self.leaves[entry.quantizer] = zero.expand(entry.weight.shape).requires_grad_()
                leaf.register_hook(self._refuse_outside)

    @contextmanager
    def a_pass(self, or_else: Callable[[], None]) -> Iterator[None]:
        """Mark the block as a pass; call `or_else` if it ends by an exception."""
        before, self.is_in_a_pass = self.is_in_a_pass, True
        try:
            yield
        except BaseException:
            or_else()
            raise
        finally:
            self.is_in_a_pass = before

    @contextmanager
    def catching(self, pass_on: bool) -> Iterator[None]:
        """Catch gradients at the leaves inside the block.

        Args:
            pass_on: Whether gradients also reach what lies behind `w_q`; if not, autograd need not compute them.
        """
        before = self._catches, self._passes_on
        self._catches, self._passes_on = True, pass_on
        try:
            yield
        finally:
            self._catches, self._passes_on = before

    @contextmanager
    def clearing_with(self, watch: ClearingWatch) -> Iterator[None]:
        """Forget what leaves have caught inside the block whenever `watch` notices that gradients were cleared."""
        caught_before = any(leaf.grad is not None for leaf in self.leaves.values())

        def forget() -> None:
            if caught_before:
                raise RuntimeError(
                    "zero_grad() inside of a first pass that adds to an earlier one (several micro-batches that share "
                    'one eps): what the earlier ones gave would be lost. Use sync="local" without reuse, or do not '
                    "clear gradients inside of the loss."
                )
            for leaf in self.leaves.values():
                leaf.grad = None

        watch.followers.append(forget)
        handles = [leaf.register_hook(lambda grad: watch.check()) for leaf in self.leaves.values()]  # noqa: ARG005
        try:
            yield
            watch.check()
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def adding(self, eps: Mapping[Quantizer, Tensor]) -> Iterator[None]:
        """Let quantizers return `w_q + eps` inside the block."""
        before, self._added = self._added, eps
        try:
            yield
        finally:
            self._added = before

    @contextmanager
    def displaced(self, model: nn.Module, eps: Displacement, rho: float) -> Iterator[None]:
        """Run the block as a pass of `model` with `eps`, made with the radius `rho`, in place; frozen tensors stay."""
        before, self.is_in_a_pass = self.is_in_a_pass, True
        # Clear the cache of autocast: inside of one autocast block it would carry low-precision copies of parameters
        # from one point to the other.
        torch.clear_autocast_cache()
        try:
            with eps.without_frozen().shifted(), self.adding(eps.outputs):
                try:
                    yield
                finally:
                    self.is_in_a_pass = before
                    sharding.reshard(model)
            self.rounding.conclude(rho)
        finally:
            torch.clear_autocast_cache()

    def _refuse_outside(self, grad: Tensor) -> None:  # noqa: ARG002 (a hook)
        if not self.is_in_a_pass:
            raise RuntimeError(
                "The backward of a first pass ran after its block. Put it into the block, forward and backward: "
                "`with minimizer.ascent(): loss_of(batch).backward()`. Outside, gradients of the first pass would "
                "stay in p.grad and be missing in the perturbation."
            )

    def _before_forward(self, module: nn.Module, args: tuple) -> None:  # noqa: ARG002
        if self.is_in_a_pass and module is self._watched:
            sharding.reduce_gradients(module)

    _before_forward.stays_behind = True  # type: ignore[attr-defined]  # see layers/wrapping.py

    def _hook(self, quantizer: nn.Module, args: tuple, w_q: Tensor) -> Tensor:  # noqa: ARG002 (a forward hook)
        assert isinstance(quantizer, Quantizer)
        eps = self._added.get(quantizer)
        if eps is not None:
            self.rounding.look(w_q, eps)
            w_q = w_q + eps.to(w_q.dtype)  # FSDP2 may hand out weights in half precision
        leaf = self.leaves.get(quantizer) if self._catches else None
        if leaf is not None:
            if asks_for_operations():
                raise RuntimeError(
                    f"{quantizer.path}: a first pass inside of a transform of torch.func (grad, vmap) or of "
                    "torch.jit.trace, which give the perturbation no gradient. Call loss.backward()."
                )
            w_q = _CatchGradient.apply(w_q if self._passes_on else w_q.detach(), leaf)
        return w_q

    _hook.stays_behind = True  # type: ignore[attr-defined]  # see layers/wrapping.py


def _remove_abandoned(hooks: MutableMapping[int, Callable]) -> None:
    """Remove the hooks of seams that nobody uses: not where these go, which may be in the middle of a forward."""
    for key, hook in list(hooks.items()):
        seam = getattr(hook, "__self__", None)
        if isinstance(seam, Seam) and seam.is_abandoned:
            del hooks[key]

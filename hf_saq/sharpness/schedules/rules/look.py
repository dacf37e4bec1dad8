"""Keep, for a few steps, the part of the perturbed gradient that makes minima flat: LookSAM, arXiv:2203.02714."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from ... import sharding
from ..knobs import Knobs
from ..rule import Action, MicroBatch, Outcome
from .stale import check_renewal
from .two_passes import TwoPasses

ROUNDING = 100
"""Units in the last place of the gradient: a component shorter than so many of them is noise, and is not used."""


class Look(TwoPasses):
    """Keeps a component of the gradient of every two-pass step and adds it to the gradients of the steps between."""

    has_state = True
    needs_whole_gradients = True

    def forget(self) -> None:
        super().forget()
        self.component = OrthogonalComponent(self.knobs.look_alpha)
        self._clean_grads: dict[nn.Parameter, Tensor] = {}

    @classmethod
    def check(cls, knobs: Knobs) -> None:
        check_renewal("look", knobs)
        if knobs.ascent_fraction < 1:
            raise ValueError(
                f"reuse='look' with ascent_fraction={knobs.ascent_fraction}: the clean and the perturbed gradient "
                "that it compares must come from the same images. Leave ascent_fraction out, or use reuse='stale'."
            )

    @classmethod
    def action(cls, knobs: Knobs, step: int) -> Action:
        return "reuse" if step % knobs.interval else "two passes"

    def begin_step(self) -> None:
        super().begin_step()
        self._clean_grads = {}

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        if micro.action == "two passes":
            outcome, _ = self.two_passes(micro, self._clean_grads)
            if micro.is_last:
                self.component.keep(self._clean_grads)
                self._clean_grads = {}
            return outcome
        outcome = Outcome(micro.backward(micro.batch))
        if micro.is_last:
            self.component.add_to_gradients(self.minimizer.model)
        return outcome

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.component.named(self.minimizer.model), {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.component.load(tensors, self.minimizer.model)


class OrthogonalComponent:
    """Keeps `g_v`, the component of the perturbed gradient that is orthogonal to the clean one (Algorithm 1).

        g_s = dL/dw at the perturbed point,  g = dL/dw,  g_v = g_s - (g_s . g / ||g||^2) g     every k-th step
        g <- g + alpha * ||g|| / ||g_v|| * g_v                                                 between

    Products and norms are global over what is perturbed. All gradients are those that the optimizer gets, averaged
    over processes, so that every process keeps the same `g_v`. A loss scale has no influence.

    Args:
        alpha: The paper's `alpha`, >= 0.

    Attributes:
        direction (`dict[nn.Parameter, Tensor]`): `g_v / ||g_v||`; empty before the first step that keeps one, zero
            where there was nothing but rounding errors to keep.
    """

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.direction: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def keep(self, clean: dict[nn.Parameter, Tensor]) -> None:
        """Keep the component of `p.grad` that is orthogonal to `clean`, in the memory of `clean`.

        Nothing is read back from the device: where there is nothing to keep, the direction becomes zero.
        """
        self.direction = {}
        parameters = [p for p in clean if p.grad is not None]
        if not parameters:
            return
        g, g_s = [clean[p] for p in parameters], [_grad(p) for p in parameters]
        sharding.average_over_processes(g)
        length, perturbed_length = sharding.precise(sharding.norm(g)), sharding.precise(sharding.norm(g_s))
        products = ((a * b).sum(dtype=length.dtype).to(length.device) for a, b in zip(g, g_s, strict=True))
        share = reduce(add, products) / length**2
        for a, b in zip(g, g_s, strict=True):
            a.mul_(-share.to(a.device)).add_(b)  # g is now g_v
        norm = sharding.precise(sharding.norm(g))
        smallest = ROUNDING * max(torch.finfo(t.dtype).eps for t in g) * perturbed_length
        found = torch.isfinite(length) & torch.isfinite(perturbed_length) & (norm > smallest)
        factor = torch.where(found, 1 / norm, 0.0)
        for a in g:
            a.mul_(factor.to(a.device)).nan_to_num_(0.0, 0.0, 0.0)  # zero times infinity is not zero
        self.direction = dict(zip(parameters, g, strict=True))

    @torch.no_grad()
    def add_to_gradients(self, model: nn.Module) -> None:
        """Add `alpha * ||g|| / ||g_v|| * g_v` to `g`, which is in `p.grad`; reads `||g||` back from the device."""
        # Use the model's order, which a resumed run has too: the last bit of a norm depends on the order of its terms.
        known = [p for p in model.parameters() if p in self.direction and p.grad is not None]
        parameters = [p for p in known if p.requires_grad]  # gradients of frozen ones may be left from before
        if parameters:
            grads = [_grad(p) for p in parameters]
            alpha = self.alpha * sharding.norm(grads).item()
            torch._foreach_add_(grads, [self.direction[p] for p in parameters], alpha=alpha)

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of `direction` by the names of parameters in `model`, to be stored."""
        return {name: self.direction[p] for name, p in model.named_parameters() if p in self.direction}

    def load(self, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
        """Load what [`named`] returned.

        Raises:
            ValueError: If `model` has no parameter of a stored name.
        """
        parameters = dict(model.named_parameters())
        unknown = sorted(set(tensors) - set(parameters))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: a component of its gradient is stored, but {type(model).__name__} has no such "
                "parameter. Resume with the model that the checkpoint is of."
            )
        self.direction = {parameters[name]: tensor.to(parameters[name].device) for name, tensor in tensors.items()}


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad

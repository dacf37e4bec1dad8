"""LookSAM: the part of the perturbed gradient that makes minima flat, kept for a few steps. arXiv:2203.02714."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import sharding

ROUNDING = 100
"""A component shorter than so many units in the last place of the gradient is noise, and is not used."""


class OrthogonalComponent:
    """`g_v`, the component of the perturbed gradient that is orthogonal to the clean one (Algorithm 1).

        g_s = dL/dw at the perturbed point,  g = dL/dw,  g_v = g_s - (g_s . g / ||g||^2) g     every k-th step
        g <- g + alpha * ||g|| / ||g_v|| * g_v                                                 between

    Products and norms are global over what is perturbed. All gradients are those that the optimizer gets, averaged
    over processes, so that every process keeps the same `g_v`. Any loss scale cancels.

    Args:
        alpha: The paper's `alpha`.

    Attributes:
        direction (`dict[nn.Parameter, Tensor]`): `g_v / ||g_v||`; empty before the first step that keeps one, or where
            there was nothing but rounding errors to keep.
    """

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.direction: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def keep(self, clean: dict[nn.Parameter, Tensor]) -> None:
        """Keep the component of `p.grad` that is orthogonal to `clean`, in the memory of `clean`."""
        parameters = [p for p in clean if p.grad is not None]
        g, g_s = [clean[p] for p in parameters], [_grad(p) for p in parameters]
        sharding.average_over_processes(g)
        self.direction = {}
        length, perturbed_length = sharding.norm(g), sharding.norm(g_s)
        if not (0 < length < float("inf") and 0 < perturbed_length < float("inf")):
            return
        share = sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(g, g_s, strict=True)) / length**2
        torch._foreach_mul_(g, -share)
        torch._foreach_add_(g, g_s)  # g is now g_v
        norm = sharding.norm(g)
        if norm > ROUNDING * max(torch.finfo(t.dtype).eps for t in g) * perturbed_length:
            torch._foreach_mul_(g, 1 / norm)
            self.direction = dict(zip(parameters, g, strict=True))

    @torch.no_grad()
    def add_to_gradients(self, model: nn.Module) -> None:
        """`g + alpha * ||g|| / ||g_v|| * g_v`, in `p.grad`."""
        # In the model's order, which a resumed run shares: the last bit of a norm depends on the order of its terms.
        parameters = [p for p in model.parameters() if p in self.direction and p.grad is not None]
        if parameters:
            grads = [_grad(p) for p in parameters]
            torch._foreach_add_(
                grads, [self.direction[p] for p in parameters], alpha=self.alpha * sharding.norm(grads)
            )

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """`direction` by the names of parameters in `model`, to be stored."""
        return {name: self.direction[p] for name, p in model.named_parameters() if p in self.direction}

    def load(self, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
        """Take what [`named`] gave.

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

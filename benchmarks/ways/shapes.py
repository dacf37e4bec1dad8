"""Change the direction or the length of an `eps` that a climb has made: what several ways to train differ in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_saq import SharpnessAwareMinimizer
from hf_saq.quantizers import Quantizer
from hf_saq.sharpness import Displacement, quantized_weights


class Shape(Protocol):
    """Returns the `eps` to use in place of `eps`, which is not empty and was made by `minimizer` just now."""

    def __call__(
        self, eps: Displacement, minimizer: SharpnessAwareMinimizer, own: Mapping[str, float]
    ) -> Displacement: ...


def unchanged(eps: Displacement, minimizer: SharpnessAwareMinimizer, own: Mapping[str, float]) -> Displacement:  # noqa: ARG001
    """Return `eps` as it is."""
    return eps


@torch.no_grad()
def noisy(eps: Displacement, minimizer: SharpnessAwareMinimizer, own: Mapping[str, float]) -> Displacement:
    """Add to the direction `d` of `eps` a random one: `eps = rho * (d + noise * z) / ||d + noise * z||`.

    `z` is Gaussian with an expected length of 1. After Wei, Zhang and Tan, Neural Networks 185, 2025, who add it to
    the gradient of a micro-batch.
    """
    if minimizer.rho == 0 or own["noise"] == 0:
        return eps
    tensors = tensors_of(eps)
    deviation = own["noise"] * minimizer.rho / sum(t.numel() for t in tensors) ** 0.5
    for t in tensors:
        t.add_(torch.randn_like(t), alpha=deviation)
    return scaled(eps, minimizer.rho / length_of(tensors))


@torch.no_grad()
def loss_budget(eps: Displacement, minimizer: SharpnessAwareMinimizer, own: Mapping[str, float]) -> Displacement:
    """Shorten `eps` to the radius `min(sigma / ||g||, rho)`: LE-SAM, arXiv:2605.10183.

    `sigma` is the rise of the loss that it allows to first order, in nats.
    """
    first_order_rise = minimizer.rho * minimizer.ascent_norm
    return scaled(eps, own["sigma"] / first_order_rise) if first_order_rise > own["sigma"] else eps


@torch.no_grad()
def per_layer(eps: Displacement, minimizer: SharpnessAwareMinimizer, own: Mapping[str, float]) -> Displacement:  # noqa: ARG001
    """Give each tensor a radius in proportion to its own length: `eps_l = rho * ||p_l|| / ||p|| * g_l / ||g_l||`.

    `p` are the tensors that are perturbed, quantized weights among them as `Q(w)`. The whole `eps` has the length
    `rho`, unless a tensor of weights has no gradient.
    """
    weights = {entry.quantizer: entry.weight for entry in quantized_weights(minimizer.model)}
    sizes = [q.fake_quantize(weights[q]).norm() for q in eps.outputs] + [p.norm() for p in eps.in_place]
    total = length_of(sizes)
    for t, size in zip(tensors_of(eps), sizes, strict=True):
        length = t.norm()
        t.mul_(torch.where(length > 0, minimizer.rho * size / (total * length), 0.0))
    return eps


def tensors_of(eps: Displacement) -> list[Tensor]:
    """List what `eps` adds, first to outputs of quantizers."""
    return [*eps.outputs.values(), *eps.in_place.values()]


def keys_of(eps: Displacement) -> list[Quantizer | nn.Parameter]:
    """List where `eps` adds, in the order of [`tensors_of`]."""
    return [*eps.outputs, *eps.in_place]


def length_of(tensors: list[Tensor]) -> float:
    """Compute the L2 norm over all of them."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).item()


def scaled(eps: Displacement, factor: float) -> Displacement:
    """Multiply `eps` in its own memory."""
    torch._foreach_mul_(tensors_of(eps), factor)
    return eps

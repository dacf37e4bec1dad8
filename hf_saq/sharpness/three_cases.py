"""Turn gradients into the perturbation `eps`: the three cases of SAQ (arXiv:2111.12273), side by side.

With `Q` the quantizer, `w` the latent weight, `w_q = Q(w)`, `L` the loss, `g_w = dL/dw` (straight-through),
`g_q = dL/dw_q`, and `norm` one global L2 norm over everything that is perturbed:

    case 1   min L(Q(w) + eps)   eps = rho * g_w / norm   (g_w is masked by clipping: not steepest ascent at Q(w))
    case 2   min L(Q(w + eps))   eps = rho * g_w / norm   (rounding swallows a small eps; SAM on a quantized model)
    case 3   min L(Q(w) + eps)   eps = rho * g_q / norm   (SAQ)

The gradient at the perturbed point is what the optimizer applies to `w`. The adaptive form (ASAM, arXiv:2102.11600)
measures each element against its own size, with `T = |p| + eta` elementwise and 1 for biases:

    eps = rho * T^2 g / ||T g||

These are functions of gradients: nothing here knows how they were collected or how `eps` is put in place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import sharding
from .displacement import Displacement
from .perturbed_tensors import PerturbedTensors, QuantizedWeight

TOLD_AFTER = 20
"""Climbs in a row without a direction; the loss scale of fp16 takes fewer to find its place."""

Case = Literal[1, 2, 3]
Gradients = dict[QuantizedWeight | nn.Parameter, Tensor]
"""A gradient under a `QuantizedWeight` is `g_q`; under a parameter, latent weights included, it is the parameter's."""


class Climb(NamedTuple):
    """Says how gradients become `eps`: some arguments of `SharpnessAwareMinimizer`."""

    rho: float
    case: Case
    adaptive: bool
    eta: float


def check_climb(rho: float, case: int, eta: float, sync: str) -> None:
    """Raise `ValueError` if one of them is out of range."""
    for name, value in (("rho", rho), ("eta", eta)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}; expected a finite number >= 0.")
    if case not in (1, 2, 3):
        raise ValueError(f"case={case}; expected 1, 2 or 3. For plain training use no minimizer.")
    if sync not in ("local", "global"):
        raise ValueError(f'sync={sync!r}; expected "local" or "global".')


def latent_weights_are_asked(case: Case) -> bool:
    """Tell whether `eps` is made of `g_w`, the gradients of latent weights, rather than of `g_q`."""
    return case in (1, 2)


@torch.no_grad()
def climb(grads: Gradients, tensors: PerturbedTensors, how: Climb, *also: Tensor) -> tuple[Displacement, list[float]]:
    """Compute `eps` from the gradients of first passes, in their own memory.

    Reads back from the device once, the norm: where it is zero or not finite there is no direction to climb.

    Args:
        grads: The gradients that `how.case` asks for, with the same keys in the same order on every process.
        tensors: The tensors they belong to.
        also: 0-d tensors to read back at the same time.

    Returns:
        `eps`, which is empty where `norm` is zero or not finite; `norm`, followed by the numbers in `also`.
    """
    if how.case == 1:  # eps is added to outputs of quantizers, which are whole on every process
        grads = {key: sharding.full(g) if key in tensors.latent else g for key, g in grads.items()}
    if how.adaptive:
        multiply_by_size(grads, tensors, how)  # T g
    plain = [g for g in grads.values() if not sharding.is_sharded(g)]
    sharded = [g for g in grads.values() if sharding.is_sharded(g)]
    norm, norm_for_shards, *numbers = sharding.global_norms(plain, sharded, *also)
    if not all(0 < n < math.inf for n in (norm, norm_for_shards)):
        return Displacement(), [norm, *numbers]
    for some, length in ((plain, norm), (sharded, norm_for_shards)):
        if some:
            torch._foreach_mul_(some, how.rho / length)  # rho * g / norm
    if how.adaptive:
        multiply_by_size(grads, tensors, how)  # T^2 g
    return place(grads, tensors, how.case), [norm, *numbers]


def tell_of_skipping(in_a_row: int, norm: float) -> None:
    """Warn once that nothing is perturbed any more.

    Args:
        in_a_row: How many climbs, the last one included, had no direction.
        norm: Of the gradients of the last one: zero or not finite.
    """
    if in_a_row != TOLD_AFTER:
        return
    if norm == 0:
        why = "is zero: the loss does not depend on the perturbed tensors, as where it is that of a copy of the model"
    else:
        why = f"is {norm}: a loss may need more images than a part of a batch has (ascent_fraction), pairs for example"
    warnings.warn(
        f"The gradient that the last {TOLD_AFTER} perturbations were to be made of {why}. They were all left out, "
        'which is plain training. Try schedule="full", and look at the loss and its gradient in a first pass.',
        stacklevel=2,
    )


def multiply_by_size(grads: Gradients, tensors: PerturbedTensors, how: Climb) -> None:
    """Multiply each gradient by ASAM's `T = |p| + eta`, of the quantized weight where `eps` is added to that.

    Sizes are computed one after the other, since together they would take as much memory as all weights.
    """
    for key, grad in grads.items():
        if key in tensors.without_size:
            continue
        if isinstance(key, QuantizedWeight):
            size = sharding.quantized(key).abs_()
        elif key in tensors.latent and how.case == 1:
            size = sharding.quantized(tensors.latent[key]).abs_()
        else:
            size = key.abs()
        grad.mul_(size.add_(how.eta))


def place(eps: Mapping[QuantizedWeight | nn.Parameter, Tensor], tensors: PerturbedTensors, case: Case) -> Displacement:
    """Say where each part of `eps` is added: behind a quantizer, `Q(w) + eps`, or to the parameter, `Q(w + eps)`."""
    placed = Displacement()
    for key, value in eps.items():
        if isinstance(key, QuantizedWeight):
            placed.outputs[key.quantizer] = value
        elif case == 1 and key in tensors.latent:
            # Add it behind every quantizer that reads this weight, although it is made of the latent gradient.
            placed.outputs.update({entry.quantizer: value for entry in tensors.weights if entry.weight is key})
        else:
            placed.in_place[key] = value
    return placed

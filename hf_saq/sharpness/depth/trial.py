"""Try once whether two passes that share what comes before the late layers give the gradients of whole passes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...quantizers import in_double
from ..buffer_state import BufferState
from ..random_state import RNGState
from .late_layers import LateLayers, find_late_layers
from .shared_prefix import SharedPrefix, reason_against_sharing

NOT_THE_SAME = 1e-3
"""Relative difference of a gradient that is no rounding; shared passes compute with the same numbers."""


def choose_late_layers(
    model: nn.Module, depth: float, perturbed: Collection[nn.Parameter], run: Callable[[], object]
) -> LateLayers:
    """Find late layers as [`find_late_layers`], whose arguments these are, and try whether passes can share the rest.

    Gradients are left in `p.grad`; there must be none before.
    """
    before = RNGState(), BufferState(model)
    late = find_late_layers(model, depth, perturbed, run)
    if reason_against_sharing(model, late):
        return late
    return replace(late, obstacle=_reason_of_a_trial(model, SharedPrefix(model, late), run, before))


def _reason_of_a_trial(
    model: nn.Module, prefix: SharedPrefix, run: Callable[[], object], before: tuple[RNGState, BufferState]
) -> str:
    """Run both passes without a perturbation in between, and compare with the gradients that are in `p.grad`.

    A model may do what nothing but a trial shows: hand values past the late layers, remember some, draw random numbers
    between its layers.

    Args:
        run: Runs forward and backward of the batch that left the gradients in `p.grad`, which are put back.
        before: The random state and the buffers that this began with.

    Returns:
        Why the passes cannot share the prefix; `""` if they can.
    """
    parameters = dict(model.named_parameters())
    expected = {name: p.grad for name, p in parameters.items()}
    try:
        for sharing in (prefix.recording, prefix.replaying):
            for state in before:
                state.restore()
            for p in parameters.values():
                p.grad = None
            with sharing():
                run()
        wrong = _different({name: p.grad for name, p in parameters.items()}, expected)
    except Exception as error:
        return f"in a trial of running what comes before the perturbed layers once the model failed ({error})"
    finally:
        prefix.forget()
        for name, p in parameters.items():
            p.grad = expected[name]
    if not wrong:
        return ""
    return f"in a trial of running what comes before the perturbed layers once the gradient of {wrong[0]} was another"


def _different(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> list[str]:
    """Name the gradients that are missing or differ by more than rounding."""
    norms = {name: in_double(grad).norm() for name, grad in expected.items() if grad is not None}
    if not norms:
        return []
    rounding = 1e-6 * torch.stack([norm.to("cpu") for norm in norms.values()]).norm()
    different = []
    for name, norm in norms.items():
        grad = found[name]
        if grad is None:
            is_wrong = bool(norm > 0)
        else:  # not finite, as in a step that fp16 skips: neither is right
            distance = (in_double(grad) - in_double(expected[name])).norm().to("cpu")  # type: ignore[arg-type]
            is_wrong = bool(distance > NOT_THE_SAME * norm.to("cpu") + rounding)
        if is_wrong:
            different.append(name)
    return different

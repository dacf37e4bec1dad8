"""Choose one option for each layer so that a sum of losses is smallest and a sum of costs keeps to a budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ...installing import how_to_install

OBJECTIVE_RANGE = 1000.0
"""What the largest loss is scaled to: the solver stops when it is sure of the optimum up to 1e-6."""
LARGEST_BUDGET = 1e6
"""What larger budgets are scaled to."""
TOLERANCE = 1e-6
"""How far the solver may exceed a constraint."""


class Option(NamedTuple):
    """Holds bits that a layer may have, `None` for an operand that has no choice; what they cost; what they lose."""

    weight_bits: int | None
    activation_bits: int | None
    cost: int
    loss: float


def solve(
    layers: Sequence[Sequence[Option]], budget: int, alike: Collection[Sequence[int]] = ()
) -> list[Option] | None:
    """Find the options with the smallest sum of losses, exactly, by scipy's `milp` (HiGHS).

    Args:
        layers: The options of each layer, at least one.
        budget: Largest sum of costs.
        alike: Groups of numbers of layers that must get the same `activation_bits`.

    Returns:
        One option for each layer; `None` if no choice keeps to the budget.

    Raises:
        ImportError: If scipy is not installed.
        RuntimeError: If the solver gives up.
    """
    if find_spec("scipy") is None:
        raise ImportError(
            f"allocate_bits: scipy is not installed; expected it for its solver: {how_to_install('analysis')}."
        )
    from scipy.optimize import LinearConstraint, milp

    options = [option for layer in layers for option in layer]
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    rows: list[Any] = [owner == number for number in range(len(layers))]  # one option for each layer
    targets = [1.0] * len(layers)
    for group in alike:
        for a, b in zip(group, group[1:], strict=False):
            for bits in {option.activation_bits for k in (a, b) for option in layers[k]}:
                has_bits = np.array([option.activation_bits == bits for option in options])
                rows.append((has_bits & (owner == a)).astype(float) - (has_bits & (owner == b)))
                targets.append(0.0)
    losses = np.array([option.loss for option in options])
    # What every choice costs is taken away and the rest divided by a common divisor, so that the solver, which counts
    # in floats, sees the smallest numbers.
    cheapest = [min(option.cost for option in layer) for layer in layers]
    left = budget - sum(cheapest)
    if left < 0:
        return None
    extra = [option.cost - cheapest[k] for option, k in zip(options, owner, strict=True)]
    unit = max(math.gcd(*extra), left / LARGEST_BUDGET, 1)
    costs = np.array(extra, dtype=float) / unit
    scale = OBJECTIVE_RANGE / (np.abs(losses).max() or 1.0)  # all are zero where costs alone count
    limit = left / unit
    while True:
        found = milp(
            losses * scale,
            integrality=np.ones(len(options)),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(np.array(rows, dtype=float), targets, targets),
                LinearConstraint(costs[None], -np.inf, limit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:  # infeasible
            return None
        if found.x is None:
            raise RuntimeError(f"allocate_bits: scipy's milp found no optimum: {found.message}")
        chosen = [options[k] for k in np.flatnonzero(found.x > 0.5)]
        if sum(option.cost for option in chosen) <= budget:
            return chosen
        limit -= TOLERANCE  # the solver took its tolerance for part of the budget

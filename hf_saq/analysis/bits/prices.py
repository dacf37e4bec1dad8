"""Put a price on bits: what a layer costs, what a budget means, what the next option would change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...layers.packing import packed_size
from ..costs import bit_operations
from .allocated import Unit
from .integer_program import Option, solve

CURVE_POINTS = 9

Latencies = Mapping[tuple[int | None, int | None], float]
"""Bits of weights and of activations, `None` for an operand in float -> nanoseconds for one example."""


def never_rising(rises: dict[int, float]) -> dict[int | None, float]:
    """Raise what is below a value of more bits to that value: more bits never count as worse."""
    falling: dict[int | None, float] = {}
    highest = -float("inf")
    for bits in sorted(rises, reverse=True):
        highest = falling[bits] = max(highest, rises[bits])
    return falling


def cost_of_layer(
    unit: Unit, of_layer: Mapping[str, Any], work: int | Latencies, weight: int | None, activation: int | None
) -> int:
    """Compute what one layer costs; an operand without a quantizer is in float.

    Args:
        work: Its multiply-accumulates, or, where the unit is time, what it takes with each pair of bits.
    """
    if not isinstance(work, int):
        return round(work[weight, activation])
    macs = work
    if unit == "bytes":
        return packed_size(of_layer["weight"].weight.numel(), weight) if "weight" in of_layer and weight else 0
    if "weight" not in of_layer and len(of_layer["activation"].quantizers) > 1:
        weight = activation  # both operands of attention products are activations
    return bit_operations(macs, weight, activation)


def read_budget(budget: float | str, before: int, options: Sequence[Sequence[Option]]) -> int:
    """Turn `budget` into a number: as it is, a part of `before`, or the cost of options with equal bits.

    Equal are those that there is a choice of: where the budget is one of bytes, activations keep what they have.
    """
    if isinstance(budget, str):
        if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *x", budget.strip()):
            return int(float(match[1]) * before)
        if match := re.fullmatch(r"(\d+) *bits?", budget.strip()):
            total = 0
            for layer in options:
                choices = [{o.weight_bits for o in layer}, {o.activation_bits for o in layer}]
                wanted = [{int(match[1])} if len(bits) > 1 else bits for bits in choices]
                uniform = [o for o in layer if o.weight_bits in wanted[0] and o.activation_bits in wanted[1]]
                if not uniform and len(layer) > 1:
                    raise ValueError(
                        f"allocate_bits: budget={budget!r}, but not every layer can have {match[1]} bits; expected "
                        "one of `candidates`, not below `minimum_bits`."
                    )
                total += (uniform or layer)[0].cost
            return total
    elif 0 < budget < math.inf:
        return int(budget)
    raise ValueError(f"allocate_bits: budget={budget!r}; expected a number > 0, such as 1e9, or '0.8x', or '3 bits'.")


def why(option: Option, options: Sequence[Option], budget: int, partners: Sequence[str]) -> str:
    """Say what the nearest cheaper and the nearest dearer option would change."""
    words = []
    cheaper = [o for o in options if o.cost < option.cost]
    dearer = [o for o in options if o.cost > option.cost and o.loss < option.loss]
    if cheaper:
        other = min(cheaper, key=lambda o: (o.loss, o.cost))
        saved = (option.cost - other.cost) / budget
        words.append(f"less would add {other.loss - option.loss:.2g} and free {saved:.1%} of the budget")
    if dearer:
        other = min(dearer, key=lambda o: (o.cost, o.loss))
        needed = (other.cost - option.cost) / budget
        words.append(f"more would take {option.loss - other.loss:.2g} off for {needed:.1%}")
    if partners:
        words.append(f"activations like {', '.join(partners)}")
    return "; ".join(words) or "no other choice"


def loss_curve(options: Sequence[Sequence[Option]], groups: Sequence[Sequence[int]]) -> tuple[tuple[int, float], ...]:
    """Solve for budgets from the least that any choice costs to the most, evenly spaced by ratio."""
    least = sum(min(o.cost for o in layer) for layer in options)
    most = sum(max(o.cost for o in layer) for layer in options)
    budgets = [int(least * (most / max(least, 1)) ** (k / (CURVE_POINTS - 1))) for k in range(1, CURVE_POINTS)]
    points = []
    for budget in dict.fromkeys([least, *budgets[:-1], most]):
        if (chosen := solve(options, budget, groups)) is not None:
            points.append((budget, sum(option.loss for option in chosen)))
    return tuple(points)


def check_latencies(
    latencies: Mapping[str, Latencies] | None, needed: Mapping[str, Sequence[Any]]
) -> Mapping[str, Latencies]:
    """Return `latencies`, if they have every layer with all the bits that it may get.

    Raises:
        ValueError: If they lack something, or a number is not positive.
    """
    if latencies is None:
        raise ValueError(
            "allocate_bits: unit='ns' needs `latencies`: layer -> (weight bits, activation bits) -> ns, as "
            "hf_saq.analysis.measure_latencies returns them."
        )
    for name, pairs in needed.items():
        for pair in pairs:
            found = latencies.get(name, {}).get(pair)
            if found is None or not 0 < found < float("inf"):
                raise ValueError(
                    f"allocate_bits: latencies[{name!r}][{pair}] is {found!r}; expected nanoseconds > 0, for every "
                    "layer and all bits that it has or may get. Measure with the same candidates."
                )
    return latencies

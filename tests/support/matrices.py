"""Matrices of parameters: `make test` runs a slice of each, `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import pytest


def matrix(every: int, **axes: Iterable | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test over all combinations of `axes`, all but one in `every` of them marked as slow.

    Those that are not lie on diagonals, where the indices add up to a multiple of `every`. Every value of each axis is
    among them, and for each pair of values of two axes whose third one has at least `every` values, the pair is.

    Args:
        axes: Values by the name of the parameter, or a mapping of readable names to values.
    """
    named = {name: values if isinstance(values, Mapping) else _by_text(values) for name, values in axes.items()}
    cells, seen = [], {name: set() for name in named}
    for indices in product(*(range(len(values)) for values in named.values())):
        keys = [list(values)[index] for values, index in zip(named.values(), indices, strict=True)]
        in_slice = sum(indices) % every == 0
        values = [named[name][key] for name, key in zip(named, keys, strict=True)]
        cells.append(pytest.param(*values, id="-".join(keys), marks=() if in_slice else pytest.mark.slow))
        if in_slice:
            for name, key in zip(named, keys, strict=True):
                seen[name].add(key)
    missing = {name: set(values) - seen[name] for name, values in named.items() if set(values) - seen[name]}
    assert not missing, f"one in {every} leaves out {missing}"
    return pytest.mark.parametrize(list(named), cells)


def _by_text(values: Iterable) -> dict[str, Any]:
    return {str(value): value for value in values}

"""The slice of a matrix that `make test` runs: small, with every value of every axis, and nothing lost."""

from __future__ import annotations

from itertools import product

import pytest
from matrices import matrix

AXES = {"letter": "abcde", "number": {"two": 2, "three": 3, "four": 4}, "flag": [True, False]}


def test_every_combination_is_there_and_one_in_so_many_is_not_slow():
    names, cells = matrix(3, **AXES).args
    assert names == ["letter", "number", "flag"]
    assert [cell.values for cell in cells] == list(product("abcde", (2, 3, 4), (True, False)))
    assert cells[0].id == "a-two-True"
    fast = [cell.values for cell in cells if not cell.marks]
    assert len(fast) == len(cells) / 3
    assert [set(values) for values in zip(*fast, strict=True)] == [set("abcde"), {2, 3, 4}, {True, False}]
    assert {(letter, flag) for letter, _, flag in fast} == set(product("abcde", (True, False)))
    assert {cell.marks[0].name for cell in cells if cell.marks} == {"slow"}


def test_a_slice_that_leaves_out_a_value_is_refused():
    with pytest.raises(AssertionError, match="one in 3 leaves out {'letter': {'b'}}"):
        matrix(3, letter="abc", flag=[True, False])

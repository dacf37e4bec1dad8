"""Check single fields of a configuration; each error says where the value stands, what it is and what was expected."""

from __future__ import annotations

from typing import Any


def check_choice(where: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` unless `value` is one of `choices`; the message begins with `where`."""
    if isinstance(value, (bool, float)) or value not in choices:  # `in` takes True and 1.0 for 1
        raise ValueError(f"{where}={value!r}; expected one of {list(choices)}.")


def is_number(value: Any) -> bool:
    """Tell whether `value` is a finite number >= 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")

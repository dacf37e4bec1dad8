"""Check single fields of a configuration; each error says where the value stands, what it is and what was expected."""

from __future__ import annotations

from typing import Any


def check_choice(where: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` unless `value` is one of `choices`; the message begins with `where`."""
    if isinstance(value, (bool, float)) or value not in choices:  # `in` takes True and 1.0 for 1
        raise ValueError(f"{where}={value!r}; expected one of {list(choices)}.")


def is_number(value: Any, maximum: float = float("inf")) -> bool:
    """Tell whether `value` is a finite number from 0 to `maximum`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= maximum and value != float("inf")

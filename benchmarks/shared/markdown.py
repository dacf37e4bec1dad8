"""Tables of the pages that benchmarks write."""

from __future__ import annotations


def row(*cells: str) -> str:
    """Put the cells of one line of a table between bars."""
    return "| " + " | ".join(cells) + " |"


def head(*columns: str) -> list[str]:
    """The two lines that a table begins with."""
    return [row(*columns), "|---" * len(columns) + "|"]

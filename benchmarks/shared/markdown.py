"""Tables of the pages that benchmarks write."""

from __future__ import annotations

from pathlib import Path


def row(*cells: str) -> str:
    """Put the cells of one line of a table between bars."""
    return "| " + " | ".join(cells) + " |"


def head(*columns: str) -> list[str]:
    """The two lines that a table begins with."""
    return [row(*columns), "|---" * len(columns) + "|"]


def write_between(document: Path, begin: str, end: str, text: str) -> None:
    """Write `text` into `document` between the marks `begin` and `end`, in the place of what is there.

    Raises:
        ValueError: If the page has not each of the marks once.
    """
    before = document.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1:
        raise ValueError(f"{document} has not the two marks {begin!r} and {end!r}, once each, between which to write.")
    head_, tail = before.split(begin)[0], before.split(end)[1]
    document.write_text(f"{head_}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")

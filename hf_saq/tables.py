"""Lay out text that people read: tables in plain text and in Markdown, sizes of files, names of bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Align columns with spaces, two between neighbours, none at the end of a line.

    Args:
        rows: The cells of each line, the heading among the lines; all lines have the same number of cells.
        right: Numbers of the columns that are aligned to the right, counted from 0.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown and leave out the columns that have no entry below the heading."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[_cell(line[i]) for i in used] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(used))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    # Keep what would end a cell or a row from doing so.
    return " ".join(text.split()).replace("|", "\\|")


def bits_name(weight_bits: int | None, activation_bits: int | None) -> str:
    """Name bits of weights and of activations, such as `W4A4`; 32 stands for float."""
    return f"W{weight_bits or 32}A{activation_bits or 32}"


def kibibytes(count: int) -> str:
    """Write a number of bytes as KiB with one decimal, such as `12,345.6 KiB`."""
    return f"{count / 1024:,.1f} KiB"

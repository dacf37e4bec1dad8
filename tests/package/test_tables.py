"""Tables, character for character."""

from __future__ import annotations

from hf_saq.tables import kibibytes, markdown_table, text_table


def test_text():
    rows = [("name", "n", "", "note"), ("a", "10,000", "x", ""), ("longer name", "7", "", "two words")]
    assert text_table(rows).split("\n") == [
        "name         n          note",
        "a            10,000  x",
        "longer name  7          two words",
    ]
    assert text_table(rows, right=(1, 2)).split("\n") == [
        "name              n     note",
        "a            10,000  x",
        "longer name       7     two words",
    ]


def test_markdown():
    """What would end a cell or a row does not, in the heading either."""
    rows = [("a|b", "", "1"), ("c\nd", "", "")]
    lines = ["| first | la\\|st |", "| --- | --- |", "| a\\|b | 1 |", "| c d |  |"]
    assert markdown_table(("first", "empty", "la|st"), rows) == "\n".join(lines)


def test_sizes():
    assert kibibytes(1536) == "1.5 KiB" and kibibytes(10 * 1024**2) == "10,240.0 KiB"

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
    rows = [("a|b", "", "1"), ("c", "", "")]
    assert (
        markdown_table(("first", "empty", "last"), rows) == "| first | last |\n| --- | --- |\n| a\\|b | 1 |\n| c |  |"
    )


def test_sizes():
    assert kibibytes(1536) == "1.5 KiB" and kibibytes(10 * 1024**2) == "10,240.0 KiB"

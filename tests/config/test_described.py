"""Docstrings and tables of configurations say of each field what its `help` says."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields

import pytest

from hf_saq import SAQConfig, SAQQuantizationConfig
from hf_saq.config.described import described, table_of_fields


@pytest.mark.parametrize("cls", [SAQConfig, SAQQuantizationConfig])
def test_docstrings_describe_every_field(cls):
    text = inspect.getdoc(cls)
    arguments = text[text.index("Args:\n") : text.index("Raises:\n")]
    assert arguments.count("\n    ") == sum(len(line) > 0 for line in arguments.splitlines()[1:])
    said = " ".join(arguments.split())
    for f in fields(cls):
        assert f" {f.name} (`" in said and f.metadata["help"] in said
    assert table_of_fields(cls).count("\n") == 2 + len(fields(cls))


def test_described_text_word_for_word():
    @described
    @dataclass
    class Small:
        """Is small.

        Raises:
            ValueError: Never.
        """

        names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "a|b."})

    assert Small.__doc__.startswith("Is small.")
    assert "    Args:\n        names (`list[str]`, defaults to `['a']`): a|b.\n\n" in Small.__doc__
    assert Small.__doc__.index("Args:") < Small.__doc__.index("Raises:")
    assert table_of_fields(Small) == "| field | default |  |\n| --- | --- | --- |\n| `names` | `['a']` | a\\|b. |\n"

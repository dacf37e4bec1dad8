"""Say of each field of a configuration what its `help` says: in the docstring of the class, and in a table."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)
WIDTH = 115


def described(cls: Class) -> Class:
    """Put the fields of a data class into its docstring, before what it raises. A decorator, above `dataclass`."""
    text = "Args:\n" + "".join(_entry(f) for f in fields(cls))
    before, raises, after = (cls.__doc__ or "").partition("    Raises:\n")
    cls.__doc__ = f"{before}{textwrap.indent(text, ' ' * 4)}\n{raises}{after}"
    return cls


def table_of_fields(cls: Any) -> str:
    """The fields of a data class as a table of Markdown."""
    rows = [(f"`{f.name}`", f"`{_default(f)}`", _help(f).replace("|", "\\|")) for f in fields(cls)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [("field", "default", ""), ("---",) * 3, *rows])


def _entry(f: Field[Any]) -> str:
    line = f"{f.name} (`{f.type}`, defaults to `{_default(f)}`): {_help(f)}"
    return textwrap.fill(line, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8) + "\n"


def _help(f: Field[Any]) -> str:
    return str(f.metadata["help"])


def _default(f: Field[Any]) -> str:
    return repr(f.default if f.default_factory is MISSING else f.default_factory())

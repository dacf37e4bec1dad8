"""Answer a mistyped command or option with the nearest one that there is."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator
from typing import Any, NoReturn


class SuggestingParser(argparse.ArgumentParser):
    """Parses without abbreviations, whose meaning would change with each new option, and says what may be meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)'|unrecognized arguments: .*?(--[\w-]+)", message)
        if found:
            close = difflib.get_close_matches(found[1] or found[2], sorted(set(_words(self))), n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        super().error(message)


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """List all options, choices and commands, those of commands too."""
    for action in parser._actions:
        yield from action.option_strings
        yield from (str(choice) for choice in action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _words(command)

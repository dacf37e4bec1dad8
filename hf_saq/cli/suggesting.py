"""Answer a mistyped command or option with the nearest one that there is."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn


class SuggestingParser(argparse.ArgumentParser):
    """Parses without abbreviations, whose meaning would change with each new option, and says what may be meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)'|unrecognized arguments: .*?(--[\w-]+)", message)
        if found:
            word, words = found[1] or found[2], sorted(set(_words(self)))
            if word in words:  # rightly spelled, in the wrong place
                commands = _commands_with(self, word)
                message += f"; {word} is an option of {', '.join(commands)} and comes after it" if commands else ""
            else:
                close = difflib.get_close_matches(word, words, n=1)
                message += f"; did you mean {close[0]}?" if close else ""
        super().error(message + self._swallowed(message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def _swallowed(self, message: str) -> str:
        """Say where paths belong, if an option of several values may have taken them for its own."""
        places = [str(action.metavar) for action in self._actions if not action.option_strings and action.metavar]
        lists = [
            option
            for action in self._actions
            if action.nargs == "+"
            for option in action.option_strings
            if option in self._given
        ]
        is_missing = message.startswith("the following arguments are required")
        guilty = [option for option in lists if is_missing or message.startswith(f"argument {option}: invalid")]
        if not places or not guilty:
            return ""
        return f"; {' '.join(places)} must come before {' and '.join(guilty)}, which takes all that follows it"


def _commands_with(parser: argparse.ArgumentParser, option: str) -> list[str]:
    """Name the commands that have this option."""
    return [
        name
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, command in action.choices.items()
        if option in command._option_string_actions
    ]


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """List all options, choices and commands, those of commands too."""
    for action in parser._actions:
        yield from action.option_strings
        yield from (str(choice) for choice in action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _words(command)

"""Write a completion script for a shell, with shtab: `hf-saq --print-completion bash`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from ..installing import how_to_install

SHELLS = ("bash", "zsh", "tcsh")
DIRECTORIES = {"DIR", "DIR_OR_REPO", "OUT", "A", "B", "OTHER", "FOLDER"}
"""Names of arguments that directories complete."""


class PrintCompletion(argparse.Action):
    """Prints the script for the shell that is named, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, *more: Any) -> None:  # noqa: ARG002
        """Print the script; exit with status 1 and one line on stderr if shtab is not installed."""
        if find_spec("shtab") is None:
            parser.exit(1, f"hf-saq: error: --print-completion needs shtab: {how_to_install('completion')}\n")
        import shtab

        for action in _arguments(parser):
            if action.metavar in DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Go through the arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
        yield action

"""Command lines of the scripts: one dataclass of options each, and the command that is stored with every run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser

Options = TypeVar("Options")


def parsed(
    kind: type[Options], argv: Sequence[str] | None, module: str, about: str, launcher: str = "python"
) -> tuple[Options, str]:
    """Read the options of a script, and put together what to type to run it again.

    Args:
        kind: Dataclass of the options.
        argv: Takes the place of `sys.argv[1:]`, if given.
        module: Name of the script's module, for the command.
        about: Docstring of the script, whose first line `--help` shows.
        launcher: Starts the module; `torchrun` and its options for several processes.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(kind, description=about.splitlines()[0])  # type: ignore[arg-type]
    (options,) = parser.parse_args_into_dataclasses(given)
    return options, shlex.join([*launcher.split(), "-m", module, *map(of_no_machine, given)])


def of_no_machine(word: str) -> str:
    """Shorten an absolute path to its name: where a machine has it is nothing to store for all."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def page_paths(argv: Sequence[str] | None, about: str, results: str, document: str) -> tuple[Path, Path]:
    """Read from the command line of a page which directory it is made of, and where it goes."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=results, help=f"stored results; default: {results}")
    parser.add_argument("document", nargs="?", type=Path, default=document, help=f"the page; default: {document}")
    args = parser.parse_args(argv)
    return args.results, args.document

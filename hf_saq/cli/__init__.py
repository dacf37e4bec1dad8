"""Run the command line `hf-saq`: parse the arguments, call functions, and print one line of text for each error.

Comes in: `sys.argv`. Goes out: text on stdout and an exit status. Nothing imports this room.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .arguments import make_parser

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or 1 with one line on stderr, or 130 after Ctrl-C.

    Args:
        argv: The arguments after the name of the program; `None` takes those of `sys.argv`.

    Raises:
        SystemExit: With status 2 if the arguments are wrong, with 0 after `--help`.
    """
    args = make_parser().parse_args(argv)
    try:
        from .commands import run  # import it after parsing: it takes seconds, and `--help` does not need it

        return run(args)
    except KeyboardInterrupt:
        print("hf-saq: interrupted", file=sys.stderr)
        return INTERRUPTED


__all__ = ["main"]

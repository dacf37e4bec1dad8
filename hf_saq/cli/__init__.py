"""The command line `hf-saq`: argument parsing, calls, and one line of text for each error.

Comes in: `sys.argv`. Goes out: text on stdout and an exit status. Nothing imports this room.
"""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 with one line on stderr; 2 for wrong arguments."""
    args = make_parser().parse_args(argv)
    from .commands import run  # after parsing: it takes seconds, and `--help` needs none of it

    return run(args)


__all__ = ["main"]

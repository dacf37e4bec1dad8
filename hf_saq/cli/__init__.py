"""The command line `hf-saq`: argument parsing, calls, and one line of text for each error.

Comes in: `sys.argv`. Goes out: text on stdout and an exit status. Nothing imports this room.
"""

from .commands import main

__all__ = ["main"]

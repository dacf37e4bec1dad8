"""Show a bar for work that takes more than seconds, where transformers would show one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

SECONDS_WITHOUT = 2.0
"""Work that takes no longer shows no bar."""

Item = TypeVar("Item")
_ours_alone = False


@contextmanager
def bars_of_ours_alone() -> Iterator[None]:
    """Show bars on a terminal inside the block, whatever is told to transformers about its own: for command lines."""
    global _ours_alone
    before, _ours_alone = _ours_alone, True
    try:
        yield
    finally:
        _ours_alone = before


def with_progress(items: Iterable[Item], doing: str) -> Iterable[Item]:
    """Go through `items`, with a bar named `doing` where [`progress_bar`] shows one."""
    return tqdm(items, desc=doing, **_how())


def progress_bar(total: int, doing: str, show: bool = True) -> tqdm:
    """Make a bar of `total` steps named `doing`, shown once they have taken two seconds. A context with `update()`.

    There is none where the progress bars of transformers are disabled, by `transformers.utils.logging`.
    """
    return tqdm(total=total, desc=doing, **_how(show))


def _how(show: bool = True) -> dict[str, Any]:
    # Look whether transformers is loaded and do not import it: nobody can have disabled its bars otherwise.
    theirs = sys.modules.get("transformers.utils.logging")
    is_off = theirs is not None and not theirs.is_progress_bar_enabled()
    if _ours_alone:
        is_off = not sys.stderr.isatty()
    return {"delay": SECONDS_WITHOUT, "disable": is_off or not show, "leave": False}

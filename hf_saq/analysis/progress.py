"""Show how far an analysis is, once it has taken a few seconds."""

from __future__ import annotations

from typing import Any

SECONDS_BEFORE_A_BAR = 3


def progress_bar(total: int, what: str, show: bool) -> Any:
    """Make a progress bar of tqdm with `total` steps; call `update()` for each step, and use it as a context."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=not show, delay=SECONDS_BEFORE_A_BAR, leave=False)

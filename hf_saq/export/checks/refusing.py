"""Refuse an export that fails a check."""

from __future__ import annotations

LISTED = 5


class ExportCheckError(ValueError):
    """Says which checks of an export failed. Nothing was written."""


def refuse(cause: str, wrong: dict[str, str]) -> None:
    """Raise `ExportCheckError` if something is wrong.

    Args:
        wrong: What is -> what was found there.
    """
    if wrong:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(wrong.items())[:LISTED])
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ExportCheckError(f"export not written, {cause}. {listed}{more}.")

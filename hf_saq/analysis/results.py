"""Share what every result of an analysis can do: become plain data for JSON, and draw itself."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

from ..installing import how_to_install

DOTS_PER_INCH = 120


class Result:
    """Makes a frozen dataclass a result: [`to_dict`] returns its fields as plain data."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as dicts, lists, strings and numbers; a number that is not finite becomes `None`."""
        return plain(dataclasses.asdict(self))  # type: ignore[call-overload]


def plain(value: Any) -> Any:
    """Turn tuples into lists, and numbers that JSON has no word for into `None`, at any depth."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure of matplotlib, in inches, that lays out its own margins.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"plot: matplotlib is not installed; expected it for pictures: {how_to_install('plot')}.")
    from matplotlib.figure import Figure  # pyplot would touch the user's own figures

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")

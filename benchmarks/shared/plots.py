"""Plots beside the pages, where matplotlib is installed; the same results give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(width: float, height: float, salt: str) -> Any:
    """Begin an empty figure, sizes in inches; `None`, with a hint on the screen, if matplotlib is missing.

    Args:
        salt: Goes into the names of elements in the file, in place of a random number.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing, `pip install '.[card]'`", flush=True)
        return None
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = salt
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write the figure as SVG, without a date."""
    figure.savefig(path, format="svg", metadata={"Date": None})

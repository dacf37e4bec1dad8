"""Plots beside the pages, where matplotlib is installed; the same results give the same bytes.

Every plot follows the reader's light or dark setting: what is drawn in one of the colours of `DARK` is drawn in its
partner where the setting is dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, PAPER, FAINT = "#1f2328", "#ffffff", "#d1d9e0"
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#6e7781"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
"""Colours of lines, in the order that they are used."""
DARK = {
    INK: "#e6edf3",
    PAPER: "#0d1117",
    FAINT: "#30363d",
    BLUE: "#58a6ff",
    ORANGE: "#f0883e",
    GREEN: "#3fb950",
    PURPLE: "#bc8cff",
    RED: "#ff7b72",
    GREY: "#8b949e",
}
STYLE: dict[str, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.facecolor": PAPER,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


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
    from cycler import cycler
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "axes.prop_cycle": cycler(color=SERIES), "svg.hashsalt": salt}
    matplotlib.rcParams.update(style)
    return Figure(figsize=(width, height), layout="constrained")


def forest(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]], colors: Sequence[str]) -> None:
    """Draw one line for each name, the first on top: a mean and, to both sides, its half interval."""
    axes.axvline(0, color=INK, linewidth=1)
    for y, ((x, error), color) in enumerate(zip(points, colors, strict=True)):
        axes.errorbar(x, y, xerr=error, fmt="o", color=color, capsize=2.5, markersize=5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def save(figure: Any, path: Path) -> None:
    """Write the figure as SVG, without a date, in both colours."""
    figure.savefig(path, format="svg", metadata={"Date": None})
    rules = "".join(
        f'[style*="fill: {light}"]{{fill:{dark}!important}}[style*="stroke: {light}"]{{stroke:{dark}!important}}\n'
        for light, dark in DARK.items()
    )
    text = path.read_text(encoding="utf-8")
    start = text.index(">", text.index("<svg")) + 1
    style = f"\n <style>@media (prefers-color-scheme: dark) {{\n{rules}}}</style>"
    path.write_text(text[:start] + style + text[start:], encoding="utf-8")

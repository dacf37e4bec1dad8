"""The plot of docs/schedules.md."""

from __future__ import annotations

from pathlib import Path

from ..shared.plots import new_figure, save
from .rows import Row

SALT = "schedules"


def draw_plot(rows: list[Row], path: Path) -> bool:
    """Gain with its interval against measured time, against passes unless all were measured; `False` if not drawn."""
    figure = new_figure(8, 5, SALT)
    if figure is None:
        return False
    measured = all(row.cost is not None for row in rows)
    axes = figure.add_subplot()
    axes.axhline(0, color="0.6", linewidth=1)
    for number, row in enumerate(rows):
        x = row.cost if measured and row.cost is not None else row.passes
        color = f"C{number % 10}"
        axes.errorbar(x, row.gain.mean, yerr=row.gain.error, fmt="o", color=color, elinewidth=1, alpha=0.8)
        place = (5, 4 if number % 2 else -11)
        axes.annotate(row.method, (x, row.gain.mean), place, textcoords="offset points", fontsize=8, color=color)
    axes.set_xlabel("time of training, plain QAT = 1" if measured else "passes of training, plain QAT = 1")
    axes.set_ylabel("gain in top-1 over plain QAT, points")
    save(figure, path)
    return True

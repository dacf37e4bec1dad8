"""The plots of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..shared.paired import Difference
from ..shared.plots import new_figure, save

SALT = "results"


def draw_gains(rows: Sequence[tuple[str, Difference | None]], path: Path) -> bool:
    """One line for each setting: the mean gain of SAQ over QAT and its interval. `False` if nothing was drawn."""
    shown = [(name, d) for name, d in rows if d is not None]
    figure = new_figure(7, 1 + 0.4 * len(shown), SALT)
    if figure is None or not shown:
        return False
    axes = figure.add_subplot()
    axes.axvline(0, color="0.6", linewidth=1)
    for y, (_, d) in enumerate(reversed(shown)):
        axes.errorbar(d.mean, y, xerr=d.error, fmt="o", color="C0" if d.sign > 0 else "C3" if d.sign < 0 else "0.4")
    axes.set_yticks(range(len(shown)), [name for name, _ in reversed(shown)])
    axes.set_xlabel("gain of SAQ over plain QAT in top-1, points, 95 % interval")
    save(figure, path)
    return True


def draw_sizes(studies: Sequence[tuple[str, Sequence[tuple[int, Difference | None]]]], path: Path) -> bool:
    """Gain against the number of training images, one line for each study. `False` if nothing was drawn."""
    figure = new_figure(7, 4, SALT)
    if figure is None:
        return False
    axes = figure.add_subplot()
    axes.axhline(0, color="0.6", linewidth=1)
    for number, (name, points) in enumerate(studies):
        shown = [(x, d) for x, d in points if d is not None]
        axes.errorbar(
            [x for x, _ in shown],
            [d.mean for _, d in shown],
            yerr=[d.error for _, d in shown],
            fmt="o-",
            color=f"C{number}",
            capsize=3,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("training images")
    axes.set_ylabel("gain of SAQ over plain QAT in top-1, points")
    axes.legend()
    save(figure, path)
    return True

"""The plots of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..shared.paired import Difference
from ..shared.plots import BLUE, GREY, INK, RED, SERIES, forest, new_figure, save

SALT = "results"


def draw_gains(rows: Sequence[tuple[str, Difference | None]], path: Path) -> bool:
    """One line for each setting: the mean gain of SAQ over QAT and its interval. `False` if nothing was drawn."""
    shown = [(name, d) for name, d in rows if d is not None]
    figure = new_figure(8, 1.3 + 0.33 * len(shown), SALT)
    if figure is None or not shown:
        return False
    from matplotlib.lines import Line2D

    axes = figure.add_subplot()
    colors = {1: BLUE, -1: RED, 0: GREY}
    forest(
        axes, [name for name, _ in shown], [(d.mean, d.error) for _, d in shown], [colors[d.sign] for _, d in shown]
    )
    axes.set(title="Gain of SAQ (case 3) over plain QAT", xlabel="points of top-1, mean and 95 % interval over seeds")
    words = {1: "interval above zero", 0: "no difference was seen", -1: "interval below zero"}
    marks = [Line2D([], [], color=colors[sign], marker="o", label=text) for sign, text in words.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    save(figure, path)
    return True


def draw_sizes(studies: Sequence[tuple[str, Sequence[tuple[int, Difference | None]]]], path: Path) -> bool:
    """Gain against the number of training images, one line for each study. `False` if nothing was drawn."""
    figure = new_figure(7, 4, SALT)
    if figure is None:
        return False
    axes = figure.add_subplot()
    axes.axhline(0, color=INK, linewidth=1)
    for number, (name, points) in enumerate(studies):
        shown = [(x, d) for x, d in points if d is not None]
        axes.errorbar(
            [x for x, _ in shown],
            [d.mean for _, d in shown],
            yerr=[d.error for _, d in shown],
            fmt="o-",
            color=SERIES[number % len(SERIES)],
            capsize=3,
            label=name,
        )
    counts = sorted({x for _, points in studies for x, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(
        title="Gain of SAQ (case 3) over plain QAT by number of training images",
        xlabel="training images",
        ylabel="points of top-1, mean and 95 % interval",
    )
    axes.legend()
    save(figure, path)
    return True

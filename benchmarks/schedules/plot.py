"""The plot of docs/schedules.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..shared.plots import BLUE, GREY, ORANGE, forest, new_figure, save
from .rows import Row

SALT = "schedules"


def draw_plot(rows: Sequence[Row], presets: Mapping[str, str], path: Path) -> bool:
    """One line for each way to train, the cheapest on top: gain with its interval, and beside it the cost.

    Cost is measured time, or passes unless all were measured. `False` if nothing was drawn.

    Args:
        presets: Ways to train that are presets -> the name, to be marked.
    """
    figure = new_figure(9, 1.2 + 0.27 * len(rows), SALT)
    if figure is None:
        return False
    from matplotlib.lines import Line2D

    measured = all(row.cost is not None for row in rows)
    cost = {row.method: row.cost if measured and row.cost is not None else row.passes for row in rows}
    shown = sorted(rows, key=lambda row: (cost[row.method], -row.gain.mean))
    names = [f'{row.method}  ("{presets[row.method]}")' if row.method in presets else row.method for row in shown]
    colors = [ORANGE if row.method in presets else BLUE for row in shown]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 3))
    forest(left, names, [(row.gain.mean, row.gain.error) for row in shown], colors)
    left.set(title="Gain over plain QAT", xlabel="points of top-1, 95 % interval")
    for label, row in zip(left.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if row.method in presets else "normal")
    right.barh(range(len(shown)), [cost[row.method] for row in shown], color=colors, height=0.55)
    right.axvline(1, color=GREY, linewidth=1, linestyle="--")
    right.set(title="Cost", xlabel=("time of training" if measured else "passes of training") + ", plain QAT = 1")
    right.tick_params(axis="y", length=0)
    right.grid(axis="y", visible=False)
    marks = [
        Line2D([], [], color=ORANGE, marker="o", label='preset, schedule="..."'),
        Line2D([], [], color=BLUE, marker="o", label="knobs given one by one"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2)
    save(figure, path)
    return True

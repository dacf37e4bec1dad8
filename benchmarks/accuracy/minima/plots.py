"""The plots of docs/flatness.md, and docs/landscape.svg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...shared.plots import BLUE, INK, ORANGE, SERIES, new_figure, save
from .findings import Minima

SALT = "minima"
COLORS = {"QAT": ORANGE, "SAQ": BLUE}
NAMES = {"qat": "QAT", "qat, twice the steps": "QAT, twice the steps", "case 3": "SAQ (case 3)"}
FORMULAS = {"quantized": "Q(w) + d", "latent": "Q(w + d)"}
LEVELS = 12


def draw_landscape(name: str, found: dict[str, dict[str, Any]], path: Path) -> bool:
    """The line of QAT and SAQ in one panel, and the plane of each beside it, on one scale. `False` if not drawn."""
    figure = new_figure(11, 3.9, SALT)
    if figure is None or set(found) != {"line", "plane"}:
        return False
    from matplotlib.colors import BoundaryNorm

    line, plane = found["line"], found["plane"]
    figure.suptitle(f"Training loss around the quantized weights: {name}", fontweight="bold", fontsize="large")
    axes, *panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    for surface in line["surfaces"]:
        style = "-" if surface["place"] == "quantized" else ":"
        label = f"{surface['name']}, {FORMULAS[surface['place']]}"
        axes.plot(line["steps"], surface["losses"], style, color=COLORS[surface["name"]], label=label)
    axes.set(title="along one direction", xlabel="step (1: the norm of each filter)", ylabel="loss, nats")
    axes.legend(fontsize="small")
    values = [x for surface in plane["surfaces"] for row in surface["losses"] for x in row]
    low, high = min(values), max(values)
    # Levels that grow by one factor show the bottom as well as the walls.
    floor = max(low, high / 1000)
    levels = [low, *(floor * (high / floor) ** (k / LEVELS) for k in range(1, LEVELS + 1))]
    for panel, surface in zip(panels, plane["surfaces"], strict=True):
        rows = list(zip(*surface["losses"], strict=True))  # rows of `losses` belong to the first direction
        drawn = panel.contourf(
            plane["steps"], plane["steps"], rows, levels=levels, cmap="viridis", norm=BoundaryNorm(levels, 256)
        )
        panel.contour(plane["steps"], plane["steps"], rows, levels=levels, colors="white", linewidths=0.4)
        panel.plot([0], [0], "+", color="white", markersize=9)
        panel.set(title=f"{surface['name']}, {FORMULAS[surface['place']]}", xlabel="first direction", aspect="equal")
        panel.grid(visible=False)
    panels[0].set_ylabel("second direction")
    bar = figure.colorbar(drawn, ax=panels, label="loss, nats", shrink=0.9, ticks=levels[::3])
    bar.ax.set_yticklabels([f"{level:.2g}" for level in levels[::3]])
    save(figure, path)
    return True


def draw_accuracies(settings: Sequence[Minima], measure: str, path: Path) -> bool:
    """Accuracy over sharpness, a panel for each task, one mark for each run. `False` if nothing was drawn."""
    figure = new_figure(3.6 * len(settings) + 0.4, 3.9, SALT)
    if figure is None or not settings:
        return False
    methods = list(dict.fromkeys(method for setting in settings for method in setting.runs))
    colors = {method: SERIES[k % len(SERIES)] for k, method in enumerate(methods)}
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        for method in setting.runs:
            x, y = setting.values(method, measure), setting.test(method)
            panel.plot([x[s] for s in x], [y[s] for s in x], "o", color=colors[method], markersize=5, alpha=0.85)
        panel.set(title=setting.name, xlabel=f"{measure} of the training loss, nats", xscale="log")
        panel.title.set_fontsize("small")
        label_ratios(panel)
    panels[0].set_ylabel("test accuracy, %")
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=colors[m], marker="o", linestyle="", label=NAMES.get(m, m)) for m in methods]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(methods))
    save(figure, path)
    return True


def draw_ratios(settings: Sequence[Minima], measures: Sequence[str], method: str, path: Path) -> bool:
    """How many times as sharp as QAT's the minima of a method are, by task and measure. `False` if not drawn."""
    rows = [(s.name, m, s.ratio(method, m)) for s in settings for m in measures]
    shown = [(f"{name}: {measure}", r) for name, measure, r in rows if r is not None]
    figure = new_figure(8.5, 1.3 + 0.33 * len(shown), SALT)
    if figure is None or not shown:
        return False
    from math import exp

    axes = figure.add_subplot()
    axes.axvline(1, color=INK, linewidth=1)
    for y, (_, ratio) in enumerate(shown):
        centre, error = ratio.mean, ratio.error
        ends = [[exp(centre) - exp(centre - error)], [exp(centre + error) - exp(centre)]]
        axes.errorbar(exp(centre), y, xerr=ends, fmt="o", color=BLUE, capsize=2.5, markersize=5)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xscale("log")
    label_ratios(axes)
    axes.grid(axis="y", visible=False)
    axes.set(
        title="Sharpness of SAQ's minima over that of plain QAT's",
        xlabel="ratio, geometric mean over seeds and 95 % interval; below 1: SAQ is flatter",
    )
    save(figure, path)
    return True


def label_ratios(axes: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times the powers of ten; at all digits if few of these are in sight."""
    low, high = axes.get_xlim()
    for digits in ((1, 2, 5), range(1, 10)):
        kept = [digit * 10**power for power in range(-4, 4) for digit in digits if low <= digit * 10**power <= high]
        if len(kept) > 1:
            break
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.minorticks_off()

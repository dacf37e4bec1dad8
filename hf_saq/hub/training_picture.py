"""Draw a picture of a training run from the log history that `Trainer` keeps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 100
PANEL_INCHES = 4


def curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Pick what can be drawn: panel -> line -> pairs of step and value. A panel needs two points in a line."""
    panels = {
        "loss": {"training": "loss", "training, perturbed": "perturbed_loss", "evaluation": "eval_loss"},
        "accuracy": {"accuracy": "eval_accuracy", "top-1": "eval_top1", "top-5": "eval_top5"},
        "sharpness": {"of training steps": "sharpness", "measured": "measured_sharpness"},
    }
    found = {}
    for panel, lines in panels.items():
        points = {
            label: [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
            for label, key in lines.items()
        }
        if any(len(line) > 1 for line in points.values()):
            found[panel] = {label: line for label, line in points.items() if line}
    return found


def draw_training_curve(log_history: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draw loss, accuracy and sharpness over the steps into the PNG `file`, as far as they were logged.

    Returns:
        Whether a picture was written: that needs matplotlib, and a quantity that was logged at least twice.
    """
    panels = curves(log_history)
    if not panels or find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # pyplot would touch the user's own figures

    width = PANEL_INCHES * len(panels)
    figure = Figure(figsize=(width, 3), dpi=DOTS_PER_INCH)
    # Set the margins by hand: matplotlib's own ways to lay out panels take as long again as the drawing.
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.2 / width, bottom=0.17, top=0.9, wspace=0.25)
    for axes, (panel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axes.set(title=panel, xlabel="step")
        # Begin at zero: an axis that begins near the first value makes any change look large.
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]), top=1.0 if panel == "accuracy" else None)
        if list(lines) != [panel]:
            axes.legend()
    figure.savefig(file, format="png")
    return True

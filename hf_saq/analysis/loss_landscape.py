"""Walk over the loss around the quantized weights of one or several models, along directions that compare them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from ..progress import progress_bar
from ..tables import text_table
from .batch_losses import LabelledBatches, Loss, left_as_it_was, refuse_not_finite, warn_of_few_digits
from .directions import before_quantizers, filter_normalized
from .results import Result, new_figure
from .weight_point import WeightPoint, shapes_of_parameters

Place = Literal["quantized", "latent"]
FORMULAS: dict[Place, str] = {"quantized": "Q(w) + d", "latent": "Q(w + d)"}


@dataclass(frozen=True)
class Surface:
    """Holds the losses of one model: `losses[i]` at `steps[i]`, or `losses[i][j]` at `(steps[i], steps[j])`.

    `place` says where the direction was added: `"quantized"` for `Q(w) + d`, `"latent"` for `Q(w + d)`.
    """

    name: str
    place: Place
    losses: tuple[Any, ...]

    def flat(self) -> list[float]:
        """Return all losses in one list, rows one after the other."""
        return [x for row in self.losses for x in (row if isinstance(row, tuple) else (row,))]

    @property
    def label(self) -> str:
        return f"{self.name}, {FORMULAS[self.place]}"


@dataclass(frozen=True)
class Landscape(Result):
    """Holds what [`landscape`] finds; `print` shows a table, `plot(file)` draws all surfaces on one scale.

    Attributes:
        steps: Factors of the direction, evenly spaced and symmetric around 0. At 1 every filter is moved by its norm.
        dimensions: 1 or 2.
        surfaces: One for each model and place.
        seconds: How long it took.
    """

    steps: tuple[float, ...]
    dimensions: int
    surfaces: tuple[Surface, ...]
    seconds: float

    def __str__(self) -> str:
        if self.dimensions == 1:
            rows = [("step", *(s.label for s in self.surfaces))]
            for i, step in enumerate(self.steps):
                rows.append((f"{step:.3g}", *(f"{s.losses[i]:.4g}" for s in self.surfaces)))
            return text_table(rows, right=range(len(rows[0])))
        middle = len(self.steps) ** 2 // 2
        rows = [("", "loss in the middle", "lowest", "mean", "highest")]
        for surface in self.surfaces:
            values = surface.flat()
            numbers = (values[middle], min(values), sum(values) / len(values), max(values))
            rows.append((surface.label, *(f"{x:.4g}" for x in numbers)))
        points = f"{len(self.steps)} x {len(self.steps)} points, {self.seconds:.0f} seconds"
        return f"{text_table(rows, right=(1, 2, 3, 4))}\n{points}"

    def plot(self, file: str | PathLike[str]) -> None:
        """Draw curves in one panel (1-D), or contours with common levels in a panel each (2-D), into `file`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        if self.dimensions == 1:
            figure = new_figure(6, 3.6)
            axes: Any = figure.subplots()
            colors = {name: f"C{k}" for k, name in enumerate(dict.fromkeys(s.name for s in self.surfaces))}
            for surface in self.surfaces:
                style = "-" if surface.place == "quantized" else ":"
                color = colors[surface.name]
                axes.plot(self.steps, surface.losses, style, color=color, marker=".", label=surface.label)
            axes.set(xlabel="step along a filter-normalized direction (1: the norm of each filter)", ylabel="loss")
            axes.set_title("Loss around the quantized weights")
            axes.legend()
        else:
            finite = [x for s in self.surfaces for x in s.flat() if math.isfinite(x)]
            low, high = min(finite), max(finite)
            levels = [low + (high - low) * k / 12 for k in range(13)] if high > low else [low - 0.5, low + 0.5]
            count = len(self.surfaces)
            figure = new_figure(3.4 * count + 1, 3.6)
            panels = figure.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0]
            for panel, surface in zip(panels, self.surfaces, strict=True):
                # Rows of `losses` belong to the first direction, which is drawn to the right.
                rows = list(zip(*surface.losses, strict=True))
                drawn = panel.contourf(self.steps, self.steps, rows, levels=levels, cmap="viridis", extend="neither")
                panel.set(title=surface.label, xlabel="first direction", aspect="equal")
            panels[0].set_ylabel("second direction")
            figure.colorbar(drawn, ax=list(panels), label="loss")
        figure.savefig(file)


@torch.no_grad()
def landscape(
    models: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    dimensions: Literal[1, 2] = 1,
    span: float = 1.0,
    points: int = 21,
    places: Sequence[Place] = ("quantized",),
    perturb: Collection[str] = ("weight",),
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Landscape:
    """Compute the loss along filter-normalized random directions around `Q(w)` (Li et al., arXiv:1712.09913).

    Models with the same parameters are moved along the same random numbers, each scaled to its own filters, so that
    their surfaces can be compared. Those tensors move that are in scope in all of them: beside a quantized model, of a
    float one the weights that are quantized there. Models run in evaluation mode and are left as they were. It takes
    `points ** dimensions` forward passes over the data for each model and place, and one more for each model; a bar
    tells how long.

    Args:
        models: A quantized, calibrated model, or several by name; of a float model alone all float weights are moved.
        batches: Dicts of keyword inputs with labels, or pairs `(inputs, labels)`; with `loss`, of any type.
        dimensions: 1 for a line, 2 for a plane.
        span: Largest step, > 0, in both senses; at 1 every filter is moved by its own norm.
        points: How many steps, odd and >= 3, so that 0 is among them.
        places: Where the direction is added: `"quantized"` for `Q(w) + d`, which shows the loss that SAQ flattens,
            `"latent"` for `Q(w + d)`, which shows the steps of rounding. Both use the same `d`, with the norms of the
            filters of `Q(w)`.
        perturb: Kinds of tensors to move, as `SharpnessAwareMinimizer` takes them. Biases and norms never move.
        loss: Computes the mean loss from model and batch.
        seed: Seed of the directions.
        progress: Whether to show a bar after a few seconds.

    Raises:
        ValueError: If an argument is out of range, a model or the batches are not what is expected, or the loss at
            `Q(w)` is not finite.
    """
    if dimensions not in (1, 2):
        raise ValueError(f"landscape: dimensions={dimensions}; expected 1 or 2.")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"landscape: points={points}; expected an odd number >= 3, so that step 0 is among them.")
    if not 0 < span < math.inf:
        raise ValueError(f"landscape: span={span}; expected a finite number > 0.")
    if not places or not set(places) <= set(FORMULAS):
        raise ValueError(f"landscape: places={list(places)}; expected some of {list(FORMULAS)}.")
    named = {type(models).__name__: models} if isinstance(models, nn.Module) else dict(models)
    if not named:
        raise ValueError("landscape: `models` is empty; expected at least one model.")
    data = LabelledBatches("landscape", batches, loss)
    for name, model in named.items():
        warn_of_few_digits(f"landscape: {name}", model)
    half = points // 2
    steps = tuple(span * k / half for k in range(-half, half + 1))
    begin = time.perf_counter()
    surfaces = []
    with progress_bar(len(named) * len(places) * points**dimensions, "landscape", progress) as bar:
        for name, point in _points(named, perturb).items():
            model = point.model
            with left_as_it_was(model):
                generator = torch.Generator("cpu").manual_seed(seed)
                first = filter_normalized(point, generator)
                second = filter_normalized(point, generator) if dimensions == 2 else point.zeros()

                def loss_at(a: float, b: float, place: Place, point: WeightPoint = point, ds: Any = (first, second)):
                    d = [a * x + b * y for x, y in zip(*ds, strict=True)]
                    moved = point.displacement(d) if place == "quantized" else before_quantizers(point, d)
                    with point.moved(moved):
                        bar.update()
                        return data.mean_loss(point.model)

                for number, loss_of_batch in enumerate(data.each_loss(model)):
                    refuse_not_finite(f"landscape: {name}", number, loss_of_batch)
                for place in places:
                    losses = tuple(
                        loss_at(a, 0.0, place) if dimensions == 1 else tuple(loss_at(a, b, place) for b in steps)
                        for a in steps
                    )
                    surfaces.append(Surface(name, place, losses))
    return Landscape(steps, dimensions, tuple(surfaces), time.perf_counter() - begin)


def _points(models: Mapping[str, nn.Module], perturb: Collection[str]) -> dict[str, WeightPoint]:
    """Find what moves in each model: the same tensors in the same order where the models have the same parameters.

    Raises:
        ValueError: If there is nothing to move in a model, or nothing that moves in all of them.
    """
    points = {name: WeightPoint(f"landscape: {name}", model, perturb) for name, model in models.items()}
    shapes = [shapes_of_parameters(model) for model in models.values()]
    first, *others = [point.names for point in points.values()]
    if all(names == first for names in others) or any(found != shapes[0] for found in shapes):
        return points
    common = [name for name in first if all(name in names for names in others)]
    if not common:
        raise ValueError(
            f"landscape: perturb={list(perturb)} selects no tensor that moves in each of {list(models)}; expected "
            "models of which the same layers are quantized. Add kinds to `perturb`, or look at one after the other."
        )
    return {name: WeightPoint(f"landscape: {name}", model, perturb, common) for name, model in models.items()}

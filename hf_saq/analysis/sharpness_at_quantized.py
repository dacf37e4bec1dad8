"""Measure how sharp the loss is around the quantized weights: rises within a radius, and curvature."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..progress import progress_bar
from ..sharpness import Displacement
from ..tables import text_table
from .batch_losses import LabelledBatches, Loss, deviation, left_as_it_was, refuse_not_finite, warn_of_few_digits
from .curvature import hessian_trace, largest_eigenvalue, random_vector
from .results import Result, new_figure
from .weight_point import WeightPoint, norm

IN_SCOPE = ("weight", "bias", "norm")
"""Kinds of tensors that are moved where nobody says otherwise, as in training."""


@dataclass(frozen=True)
class Rise:
    """Holds how much the loss rises: the mean over examples, and the values that it varies over.

    Attributes:
        mean: Mean rise of the loss.
        spread: Standard deviation of the rise over batches; 0 with one batch, NaN where a rise is not finite.
        of_batches: The rise on each batch.
    """

    mean: float
    spread: float
    of_batches: tuple[float, ...]


@dataclass(frozen=True)
class Sharpness(Result):
    """Holds what [`sharpness`] measures; `print` shows a table, `plot(file)` draws the rises.

    Attributes:
        rho: Radius: the L2 norm of what is added to the quantized weights and the other tensors in scope.
        adaptive_rho: The same for the adaptive form, where each element is measured against its own size.
        loss: Mean loss at `Q(w)`, and its values on each batch in `loss_of_batches`.
        steepest: Rise where every batch climbs along its own gradient: what SAQ minimises.
        adaptive: The same in the adaptive form (ASAM, arXiv:2102.11600).
        common: Rise along one direction for all batches, the gradient of their mean loss.
        random: Rise along random directions of length `rho`, the mean over directions for each batch.
        eigenvalue: Largest eigenvalue of the Hessian at `Q(w)`; `eigenvalue_residual` bounds its error: an eigenvalue
            lies within this distance.
        trace: Trace of the Hessian, with its standard error `trace_error`.
        elements: How many numbers the point has.
    """

    rho: float
    adaptive_rho: float
    loss: float
    loss_of_batches: tuple[float, ...]
    steepest: Rise
    adaptive: Rise
    common: Rise
    random: Rise
    eigenvalue: float
    eigenvalue_residual: float
    trace: float
    trace_error: float
    elements: int

    def _rises(self) -> dict[str, Rise]:
        return {
            f"steepest, rho={self.rho:g}": self.steepest,
            f"adaptive, rho={self.adaptive_rho:g}": self.adaptive,
            f"one direction, rho={self.rho:g}": self.common,
            f"random, rho={self.rho:g}": self.random,
        }

    def __str__(self) -> str:
        spread = f"{deviation(self.loss_of_batches):.2g} over batches"
        rows = [("", "mean", "+-"), ("loss at Q(w)", f"{self.loss:.4g}", spread)]
        for name, rise in self._rises().items():
            rows.append((f"rise: {name}", f"{rise.mean:.4g}", f"{rise.spread:.2g} over batches"))
        rows.append(("largest eigenvalue", f"{self.eigenvalue:.4g}", f"{self.eigenvalue_residual:.2g} residual"))
        rows.append(("trace of the Hessian", f"{self.trace:.4g}", f"{self.trace_error:.2g} standard error"))
        return text_table(rows, right=(1,))

    def plot(self, file: str | PathLike[str]) -> None:
        """Draw the rises, with their spread over batches, into `file`, in the format of its name.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = new_figure(6, 2.8)
        axes: Any = figure.subplots()
        rises = self._rises()
        drawn = [(r.mean, r.spread) if math.isfinite(r.mean) else (math.nan, math.nan) for r in rises.values()]
        lengths, spreads = zip(*drawn, strict=True)
        axes.barh(list(rises), lengths, xerr=spreads, capsize=3)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title="Sharpness at the quantized weights", xlabel="rise of the loss (bar: spread over batches)")
        figure.savefig(file)


def sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    rho: float,
    *,
    adaptive_rho: float | None = None,
    eta: float = 0.01,
    perturb: str | Collection[str] = IN_SCOPE,
    only: Sequence[str] | None = None,
    random_directions: int = 5,
    power_iterations: int = 30,
    tolerance: float = 1e-3,
    trace_samples: int = 10,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sharpness:
    """Measure how much the loss rises around the quantized weights `Q(w)`, and how it curves there.

    The model runs in evaluation mode and is left as it was. In passes over the data it takes
    `4 + random_directions` forward passes and one backward pass, then one forward and two backward passes for each of
    up to `power_iterations`, and one forward and `1 + trace_samples` backward passes for the trace.

    Args:
        model: A quantized, calibrated model; of a float model the float weights are the point.
        batches: Dicts of keyword inputs with labels, or pairs `(inputs, labels)`; with `loss`, of any type.
        rho: Radius, > 0, with the meaning it has in training: one global L2 norm.
        adaptive_rho: Radius of the adaptive form; `rho` by default, though useful ones are about ten times as large.
        eta: Number that is added to the size of each weight in the adaptive form, >= 0; 0.01 is that of ASAM.
        perturb: Kinds of tensors that are moved, as `SharpnessAwareMinimizer` takes them.
        only: Names of parameters. Of these tensors those alone are moved: of a float model, whose embeddings are
            weights too, those that a quantized one beside it has in scope.
        random_directions: How many random directions, >= 1.
        power_iterations: Most steps of power iteration, >= 1.
        tolerance: Relative change of the eigenvalue that ends the iteration.
        trace_samples: Vectors for the trace (Hutchinson), >= 2.
        loss: Computes the mean loss from model and batch.
        seed: Seed of the random directions; torch's own generators are left alone.
        progress: Whether to show a bar after a few seconds.

    Raises:
        ValueError: If an argument is out of range, the model or the batches are not what is expected, or the loss at
            `Q(w)` is not finite.
    """
    for name, value in (("rho", rho), ("adaptive_rho", rho if adaptive_rho is None else adaptive_rho)):
        if not 0 < value < math.inf:
            raise ValueError(f"sharpness: {name}={value}; expected a finite number > 0.")
    if not 0 <= eta < math.inf:
        raise ValueError(f"sharpness: eta={eta}; expected a finite number >= 0.")
    for name, count, least in (
        ("random_directions", random_directions, 1),
        ("power_iterations", power_iterations, 1),
        ("trace_samples", trace_samples, 2),
    ):
        if count < least:
            raise ValueError(f"sharpness: {name}={count}; expected at least {least}.")
    adaptive_rho = rho if adaptive_rho is None else adaptive_rho
    data = LabelledBatches("sharpness", batches, loss)
    warn_of_few_digits("sharpness", model)
    point = WeightPoint("sharpness", model, perturb, only)
    generator = torch.Generator("cpu").manual_seed(seed)
    steps = 2 * len(data) + 1 + random_directions + power_iterations
    with left_as_it_was(model), progress_bar(steps, "sharpness", progress) as bar:
        losses, steepest, adaptive = [], [], []
        mean_gradient = point.zeros()
        for number, weight in enumerate(data.weights):
            here, gradient = point.gradient(data, number)
            refuse_not_finite("sharpness", number, here)
            torch._foreach_add_(mean_gradient, gradient, alpha=weight)
            losses.append(here)
            steepest.append(point.loss(data, number, point.climb(gradient, rho)) - here)
            adaptive.append(point.loss(data, number, point.climb(gradient, adaptive_rho, True, eta)) - here)
            bar.update()

        def rises(displacement: Displacement) -> list[float]:
            there = point.losses(data, displacement)
            bar.update()
            return [b - a for a, b in zip(losses, there, strict=True)]

        common = rises(point.climb(mean_gradient, rho))
        at_random = []
        for _ in range(random_directions):
            direction = random_vector(point, generator)
            torch._foreach_mul_(direction, rho / norm(direction))
            at_random.append(rises(point.displacement(direction)))
        eigenvalue = largest_eigenvalue(point, data, power_iterations, tolerance, generator, bar.update)
        trace, trace_error, _ = hessian_trace(point, data, trace_samples, generator, bar.update)
    return Sharpness(
        rho=rho,
        adaptive_rho=adaptive_rho,
        loss=data.mean(losses),
        loss_of_batches=tuple(losses),
        steepest=_rise(data, steepest),
        adaptive=_rise(data, adaptive),
        common=_rise(data, common),
        random=_rise(data, [statistics.mean(values) for values in zip(*at_random, strict=True)]),
        eigenvalue=eigenvalue[0],
        eigenvalue_residual=eigenvalue[1],
        trace=trace,
        trace_error=trace_error,
        elements=sum(part.numel() for part in mean_gradient),
    )


def _rise(data: LabelledBatches, values: list[float]) -> Rise:
    return Rise(data.mean(values), deviation(values), tuple(values))

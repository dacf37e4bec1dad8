"""Find grids with the smallest squared quantization error, by a search over clipping points."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import shared_dimensions

CANDIDATES = 100
QUANTILES = 2**16
LEAST_SQUARES_STEPS = 3
RANGE_CANDIDATES = 50
TOGETHER = 2**16
"""How many values candidates have in all that are tried at once: small tensors take most of their time in calls."""
MOST_SKIPPED = 8
"""How many steps two neighbouring values of a channel may be apart for its grid to be recognised."""


def mse_scale(x: Tensor, scale_shape: tuple[int, ...], qmin: int, qmax: int, shift: float = 0.0) -> Tensor:
    """Minimise the mean of `(x - s * (clip(round(x/s - shift), qmin, qmax) + shift))^2`.

    Candidates are `s = max|x| * k/100 / (qmax + shift)`, `k = 1..100`, and the step of the grid that `x` lies on
    already, as the weights of a checkpoint do that came from a quantizer: those are then kept exactly. (With a `shift`
    their codes are: a grid around the mean of values that were rounded is as far off as that mean was moved.) The best
    is refined by least squares: with the codes `q` fixed, the error is smallest at `s = sum(x q) / sum(q^2)`.

    Args:
        x: Values to fit, at least one. Of very many that share one step size, 65,536 quantiles stand for all.
        scale_shape: `(1,)` or a shape that broadcasts against `x`, such as `(out, 1)`: one search per channel.
        shift: Offset of the grid in steps: 0 for a grid through zero, 1/2 for one that is symmetric without it.

    Returns:
        Step sizes of shape `scale_shape`; zero where all values of a channel are zero.
    """
    if torch.Size(scale_shape).numel() == 1:
        x = _quantiles(x)
    # Count dimensions from the last one: candidates that are tried at once stand in one more before the first.
    shared = [d - x.ndim for d in shared_dimensions(x, scale_shape)]
    tiny = torch.finfo(x.dtype).tiny

    def total(t: Tensor) -> Tensor:
        return t.sum(dim=shared, keepdim=True) if shared else t

    def codes(s: Tensor) -> Tensor:
        return (x / s).sub_(shift).round_().clamp_(qmin, qmax).add_(shift)

    largest = x.abs().amax(dim=shared, keepdim=True) if shared else x.abs()
    scale = (largest / (qmax + shift)).clamp_min(tiny)  # the whole range; kept where every error overflows
    best = torch.full_like(largest, torch.inf)

    def keep_best(candidates: Tensor) -> None:
        """Keep the best of `candidates`, `(n,)` and the shape of `scale`, the first of equals, if it is better."""
        nonlocal scale, best
        candidates = candidates.clamp_min(tiny)
        errors = total(codes(candidates).mul_(candidates).sub_(x).square_())
        first = errors.argmin(dim=0, keepdim=True)
        error, candidate = errors.gather(0, first)[0], candidates.gather(0, first)[0]
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)

    # Begin with the whole range, which is kept where others are as good.
    fractions = torch.tensor([CANDIDATES, *range(1, CANDIDATES)], dtype=x.dtype, device=x.device) / CANDIDATES
    for some in fractions.split(max(1, TOGETHER // x.numel())):
        keep_best(largest * some.view(-1, *[1] * x.ndim) / (qmax + shift))
    if scale.numel() == 1:
        keep_best(_step_of_own_grid(_places(x, shift)).expand_as(scale)[None])
    else:
        step = _steps_of_own_grids(x, shared, shift)
        for skipped in range(1, MOST_SKIPPED + 1):
            keep_best((step / skipped)[None])
    for _ in range(LEAST_SQUARES_STEPS):
        q = codes(scale)
        keep_best((total(x * q) / total(q.square()).clamp_min(tiny))[None])
    return torch.where(largest > 0, scale, 0).reshape(scale_shape)


def _quantiles(x: Tensor) -> Tensor:
    """Take the values of `x`, or `QUANTILES` of them that share its distribution: every n-th of the sorted ones."""
    if x.numel() <= QUANTILES:
        return x.reshape(-1)
    middle = (torch.arange(QUANTILES, dtype=torch.float64, device="cpu") + 0.5) * (x.numel() / QUANTILES)
    return x.reshape(-1).sort().values[middle.long().to(x.device)]


def _places(x: Tensor, shift: float) -> Tensor:
    """Return numbers along the last dimension of `x` whose distances are steps, if `x` lies on a grid: magnitudes, and
    zero among them; the values themselves where the grid is shifted, since then it need not be symmetric."""
    return x if shift else torch.cat([torch.zeros_like(x[..., :1]), x.abs()], dim=-1)


def _step_of_own_grid(places: Tensor) -> Tensor:
    """Find the smallest distance of two places: the step, if they lie on a grid."""
    distances = places.unique().diff()  # sorted
    # Neighbours that differ by rounding alone are one value.
    distances = distances[distances > places.abs().max() * torch.finfo(places.dtype).eps * 8]
    return distances.min() if distances.numel() else places.new_zeros(())


def _steps_of_own_grids(x: Tensor, shared: list[int], shift: float) -> Tensor:
    """Find [`_step_of_own_grid`] of each channel. It may be a few times the real step: a channel has few values."""
    kept = [d for d in range(-x.ndim, 0) if d not in shared]
    places = _places(x.permute(*kept, *shared).flatten(len(kept)), shift)
    distances = places.sort(dim=-1).values.diff(dim=-1)
    least = places.abs().amax(dim=-1, keepdim=True) * torch.finfo(x.dtype).eps * 8
    step = distances.where(distances > least, torch.inf)
    # A channel of one value has no distances, and one value alone not even one that is zero.
    step = step.amin(dim=-1).nan_to_num(posinf=0.0) if step.shape[-1] else step.sum(dim=-1)
    return step.reshape([1 if d in shared else x.shape[d] for d in range(-x.ndim, 0)])


def mse_range(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Find the ends of `levels` evenly spaced values with the smallest mean squared error on `x`, one after the other.

    The upper end moves from the largest value towards the mean in 50 steps, then the lower end likewise, then the
    upper end once more: the two hardly depend on each other unless the distribution is skewed.

    Args:
        x: Values to fit, at least one, any shape.

    Returns:
        `(low, high)`, each `(1,)`; equal if all values are.
    """
    x = _quantiles(x)
    mean = x.mean()
    to_low, to_high = x.min() - mean, x.max() - mean
    tiny = torch.finfo(x.dtype).tiny

    def error(low: float, high: float) -> float:
        start = mean + to_low * low
        step = ((to_high * high - to_low * low) / (levels - 1)).clamp_min(tiny)
        nearest = (x - start).div_(step).round_().clamp_(0, levels - 1).mul_(step).add_(start)
        return nearest.sub_(x).square_().mean().item()

    fractions = [k / RANGE_CANDIDATES for k in range(RANGE_CANDIDATES, 0, -1)]
    low = 1.0
    high = min(fractions, key=lambda f: error(low, f))
    low = min(fractions, key=lambda f: error(f, high))
    high = min(fractions, key=lambda f: error(low, f))
    return (mean + to_low * low).reshape(1), (mean + to_high * high).reshape(1)

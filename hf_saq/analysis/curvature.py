"""Estimate the largest eigenvalue and the trace of the Hessian at the quantized weights, from products with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from .batch_losses import LabelledBatches, deviation
from .weight_point import Vector, WeightPoint, dot, norm


def largest_eigenvalue(
    point: WeightPoint,
    data: LabelledBatches,
    iterations: int,
    tolerance: float,
    generator: torch.Generator,
    after_each: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Find the algebraically largest eigenvalue by power iteration.

    Power iteration finds the eigenvalue of the largest magnitude. Where that is negative, a second run on
    `H - value I`, whose eigenvalues are all >= 0, finds the largest one.

    Args:
        iterations: Most products with the Hessian in one run.
        tolerance: Relative change of the eigenvalue at which a run ends.
        after_each: Is called after each product.

    Returns:
        The eigenvalue, and the residual `|H v - value v|`: an eigenvalue lies within this distance of the value.
    """
    value, residual = _power_iteration(point, data, 0.0, iterations, tolerance, generator, after_each)
    if value >= 0:
        return value, residual
    shifted, residual = _power_iteration(point, data, value, iterations, tolerance, generator, after_each)
    return value + shifted, residual


def _power_iteration(
    point: WeightPoint,
    data: LabelledBatches,
    shift: float,
    iterations: int,
    tolerance: float,
    generator: torch.Generator,
    after_each: Callable[[], object],
) -> tuple[float, float]:
    """Find the eigenvalue of `H - shift I` of the largest magnitude, and its residual."""
    v = random_vector(point, generator)
    value, residual = 0.0, 0.0
    for _ in range(iterations):
        torch._foreach_div_(v, norm(v))
        product = point.hessian_product(data, v)
        torch._foreach_sub_(product, v, alpha=shift)
        after_each()
        before, value = value, dot(v, product)  # Rayleigh quotient
        residual = norm([p - value * part for p, part in zip(product, v, strict=True)])
        # Of H, whose eigenvalue may be much smaller than the shift.
        if norm(product) == 0 or abs(value - before) <= tolerance * abs(value + shift):
            break
        v = product
    return value, residual


def hessian_trace(
    point: WeightPoint,
    data: LabelledBatches,
    samples: int,
    generator: torch.Generator,
    after_each: Callable[[], object] = lambda: None,
) -> tuple[float, float, list[float]]:
    """Estimate the trace by Hutchinson's method: the mean of `v' H v` over vectors `v` of random signs.

    Args:
        samples: Number of vectors, >= 2.
        after_each: Is called after each batch.

    Returns:
        The trace, its standard error over vectors, and the traces of the blocks of each tensor of the point.
    """
    vectors = [random_signs(point, generator) for _ in range(samples)]
    blocks = torch.zeros(samples, len(point.keys), dtype=torch.float64, device="cpu")
    for weight, products in zip(data.weights, point.hessian_products(data, vectors), strict=True):
        for row, (v, product) in enumerate(zip(vectors, products, strict=True)):
            blocks[row] += weight * blocks.new_tensor([dot([a], [b]) for a, b in zip(v, product, strict=True)])
        after_each()
    totals = blocks.sum(1).tolist()
    return statistics.mean(totals), deviation(totals) / samples**0.5, blocks.mean(0).tolist()


def random_vector(point: WeightPoint, generator: torch.Generator) -> Vector:
    """Draw standard normal numbers on the CPU, so that every device gets the same."""
    return [torch.randn(part.shape, generator=generator, device="cpu").to(part) for part in point.zeros()]


def random_signs(point: WeightPoint, generator: torch.Generator) -> Vector:
    signs = (torch.randint(2, part.shape, generator=generator, device="cpu") * 2 - 1 for part in point.zeros())
    return [sign.to(part) for sign, part in zip(signs, point.zeros(), strict=True)]

"""Estimate from gradients and curvature what other bits of one operand do to the loss, all operands at once.

With `delta` the change of the operand and the loss expanded around the model as it stands:

    weight       rise = g . delta + 1/2 (trace(H_l) / n_l) |delta|^2      (HAWQ-V2, arXiv:1911.03852, plus the slope)
    activation   rise = mean_i s_i + 1/2 mean_i s_i^2,  s_i = g_i . delta_i

`g` and `H_l`, the block of the Hessian that belongs to one layer with `n_l` weights, are those at the output of the
weight quantizer. `g_i` is the gradient of the loss of example `i` at the output of the activation quantizers; its
square stands for the curvature (the empirical Fisher information).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...layers.as_written import run_as_written
from ...quantizers import Quantizer, in_double
from ..batch_losses import LabelledBatches
from ..curvature import hessian_trace
from ..weight_point import WeightPoint
from .candidates import Candidates, QuantizedOperand

Key = tuple[str, str, int]
"""Name of a layer, operand, bits."""


def weight_estimates(
    point: WeightPoint,
    data: LabelledBatches,
    operands: Sequence[QuantizedOperand],
    bits: Sequence[int],
    candidates: Candidates,
    trace_samples: int,
    generator: torch.Generator,
) -> dict[Key, float]:
    """Estimate the rise of the loss for every weight and every number of bits.

    Each batch costs two forward passes and `2 + trace_samples` backward passes, however many operands there are.
    """
    gradient = point.zeros()
    for number, weight in enumerate(data.weights):
        torch._foreach_add_(gradient, point.gradient(data, number)[1], alpha=weight)
    traces = hessian_trace(point, data, trace_samples, generator)[2]
    places = {entry.quantizer: k for k, entry in enumerate(point.tensors.weights)}
    values = point.values()
    found = {}
    for operand in operands:
        (quantizer,) = operand.quantizers
        if quantizer not in places:  # a frozen weight has no gradient
            continue
        k = places[quantizer]
        for b in bits:
            other = candidates.of(operand, b)[quantizer]
            with torch.no_grad():
                delta = in_double(other.fake_quantize(operand.weight) - values[k])  # type: ignore[arg-type]
            mean_curvature = traces[k] / delta.numel()
            slope = (in_double(gradient[k]) * delta).sum().item()
            found[operand.name, "weight", b] = slope + mean_curvature / 2 * delta.square().sum().item()
    return found


def activation_estimates(
    model: nn.Module,
    data: LabelledBatches,
    operands: Sequence[QuantizedOperand],
    bits: Sequence[int],
    candidates: Candidates,
) -> dict[Key, float]:
    """Estimate the rise of the loss for every activation and every number of bits.

    Each batch costs one forward and one backward pass, however many operands there are.
    """
    found: dict[Key, float] = {(operand.name, "activation", b): 0.0 for operand in operands for b in bits}
    for number, (size, weight) in enumerate(zip(data.sizes, data.weights, strict=True)):
        uses = _gradients_at_uses(model, data, number, [q for operand in operands for q in operand.quantizers])
        for operand in operands:
            for b in bits:
                others = candidates.of(operand, b)
                slopes = torch.zeros(size, dtype=torch.float64, device="cpu")
                for quantizer in operand.quantizers:
                    for x, output, gradient in uses.get(quantizer, ()):
                        with torch.no_grad():
                            products = gradient * (others[quantizer].fake_quantize(x) - output)
                        slopes += size * _by_example(products, size)  # the loss is a mean over examples
                found[operand.name, "activation", b] += weight * (slopes + slopes.square() / 2).mean().item()
    return found


def _gradients_at_uses(
    model: nn.Module, data: LabelledBatches, number: int, quantizers: Sequence[Quantizer]
) -> dict[Quantizer, list[tuple[Tensor, Tensor, Tensor]]]:
    """Return, for each time a quantizer runs, its input, its output and the gradient of the loss at its output."""
    uses: list[tuple[Quantizer, Tensor, Tensor, Tensor]] = []

    def catch(quantizer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(output).requires_grad_()
        uses.append((quantizer, args[0].detach(), output.detach(), leaf))  # type: ignore[arg-type]
        return output + leaf

    handles = [quantizer.register_forward_hook(catch) for quantizer in quantizers]
    try:
        with torch.enable_grad(), run_as_written():
            loss = data.loss(model, number)
            gradients = torch.autograd.grad(loss, [leaf for *_, leaf in uses], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[Quantizer, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for (quantizer, x, output, _), gradient in zip(uses, gradients, strict=True):
        if gradient is not None:
            found.setdefault(quantizer, []).append((x, output, gradient))
    return found


def _by_example(products: Tensor, size: int) -> Tensor:
    """Add up what belongs to each example. Parts of one image, such as windows, follow each other in dimension 0."""
    if products.shape[0] % size:
        return (in_double(products).sum() / size).expand(size).cpu()
    return in_double(products).reshape(size, -1).sum(1).cpu()

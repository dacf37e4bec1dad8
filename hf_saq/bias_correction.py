"""Bias correction: take the mean error of quantization out of each layer's output.

Rounding moves the mean of an output by `E[Q(W) Q(x)] - E[W x]`, most where inputs are far from zero mean, as behind a
ReLU, and where few weights make an output, as in depthwise convolutions. Nagel et al., arXiv:1906.04721, Section 4.2,
here with means measured on data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calibration import is_calibrated, run_in_float
from .layers import QuantizedLayer


class _MeanError:
    """Sums up, over calls of one layer, what quantizing its operands adds to each output channel."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        """Compare `output`, which `layer` made of `x` in float, with what it makes of quantized operands."""
        weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer.fake_quantize(layer.weight)
        operand = x if layer.activation_quantizer is None else layer.activation_quantizer.fake_quantize(x)
        error = (
            layer.compute(operand, weight, layer.bias).sub_(output).movedim(layer.output_channel_axis, 0).flatten(1)
        )
        total = error.sum(dim=1, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.count += error.shape[1]

    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Shift the biases of a calibrated `model`, in place, so that its layers' mean outputs are those in float.

    Meant for using a model as it is after `calibrate`; training does the same by itself. The error of each layer is
    measured at the inputs it has in the float model. It is taken off the layer's bias or, where a layer has none, is
    added to the running mean of the BatchNorm that reads its output; layers with neither are left as they are. No
    tensor is added, so that checkpoints keep their form. Costs one evaluation forward pass per batch, in which each
    quantized layer computes twice.

    Args:
        model: A quantized, calibrated model.
        batches: As for `calibrate`.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model has no quantized layer, there is no batch, or no layer was run.
        RuntimeError: If the model is not calibrated.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module.own_quantizers()]
    if not layers:
        raise ValueError(f"correct_biases: {type(model).__name__} has no quantized layer; call `quantize` first.")
    if not is_calibrated(model):
        raise RuntimeError(
            f"correct_biases: {type(model).__name__} has quantizers without a range; run `calibrate(model, batches)` "
            "first."
        )
    errors: dict[QuantizedLayer, _MeanError] = {}
    reader: dict[QuantizedLayer, _BatchNorm] = {}
    latest: dict[int, tuple[Tensor, QuantizedLayer]] = {}  # outputs by id, kept alive so that ids stay unique

    def measure(layer: nn.Module, args: tuple, output: Tensor) -> None:
        assert isinstance(layer, QuantizedLayer)
        errors.setdefault(layer, _MeanError()).update(layer, args[0], output)
        if layer.bias is None:
            latest.clear()  # a BatchNorm comes right behind its layer; older outputs need not be kept
            latest[id(output)] = (output, layer)

    def find_reader(norm: nn.Module, args: tuple) -> None:
        assert isinstance(norm, _BatchNorm)
        if args and id(args[0]) in latest and norm.running_mean is not None:
            reader[latest[id(args[0])][1]] = norm

    handles = [layer.register_forward_hook(measure) for layer in layers]
    handles += [m.register_forward_pre_hook(find_reader) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        run_in_float(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    if not errors:
        raise ValueError("correct_biases: no quantized layer was run; expected at least one batch of model inputs.")
    for layer, error in errors.items():
        if layer.bias is not None:
            layer.bias.sub_(error.mean())
        elif layer in reader:
            running_mean = reader[layer].running_mean
            assert running_mean is not None
            running_mean.add_(error.mean())
    return model

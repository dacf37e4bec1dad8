"""Correct biases: take the mean error of quantization out of each layer's output.

Rounding moves the mean of an output by `E[Q(W) Q(x)] - E[W x]`, most where inputs are far from zero mean, as behind a
ReLU, and where few weights make an output, as in depthwise convolutions. Nagel et al., arXiv:1906.04721, Section 4.2,
here with means measured on data and layers corrected in the order they run, as in that paper's appendix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..layers import QuantizedLayer
from .calibration import is_calibrated
from .observing import run_in_float, run_quantized


class _Correction:
    """Keeps the mean outputs that a layer has in float, and how far its quantized outputs must move to have them."""

    def __init__(self) -> None:
        self.float_means: list[Tensor] = []  # one for each call in one batch
        self.shift: Tensor | float = 0.0  # sum over calls, weighted by the values behind each mean
        self.count = 0

    def observe(self, layer: QuantizedLayer, output: Tensor) -> None:
        self.float_means.append(_channel_means(layer, output))

    def apply(self, layer: QuantizedLayer, output: Tensor) -> Tensor:
        """Give the quantized output its means in float, so that later layers see no error of this one."""
        shift = self.float_means.pop(0) - _channel_means(layer, output)
        values = output.numel() // len(shift)
        self.shift, self.count = self.shift + shift * values, self.count + values
        along_channels = [1] * -(layer.output_channel_axis + 1)
        return output + shift.view(-1, *along_channels).to(output.dtype)


def _channel_means(layer: QuantizedLayer, output: Tensor) -> Tensor:
    return output.movedim(layer.output_channel_axis, 0).flatten(1).mean(dim=1, dtype=torch.float64)


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Shift the biases of a calibrated `model`, in place, so that its layers' mean outputs are those in float.

    Meant for using a model as it is after `calibrate`; training does the same by itself. Layers are corrected one
    after the other, each at the inputs that the corrected layers before it give. What is missing is added to a layer's
    bias or, where it has none, taken off the running mean of the BatchNorm that reads its output; layers with neither
    stay as they are. No tensor is added, so that checkpoints keep their form. Costs two evaluation passes per batch.
    Each batch is corrected by itself and the mean is kept, so larger batches are better than many.

    Args:
        model: A quantized, calibrated model.
        batches: As for `calibrate`.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model has no quantized layer, there is no batch, or no layer that could be corrected ran.
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
    corrections = {layer: _Correction() for layer in layers}
    reader: dict[QuantizedLayer, _BatchNorm] = {}
    latest: list[tuple[Tensor, QuantizedLayer]] = []  # the last output of a layer without a bias

    def observe(layer: nn.Module, args: tuple, output: Tensor) -> None:  # noqa: ARG001
        assert isinstance(layer, QuantizedLayer)
        corrections[layer].observe(layer, output)
        latest[:] = [(output, layer)] if layer.bias is None else []

    def find_reader(norm: nn.Module, args: tuple) -> None:
        assert isinstance(norm, _BatchNorm)
        if args and latest and args[0] is latest[0][0] and norm.running_mean is not None:
            reader[latest[0][1]] = norm

    def apply(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:  # noqa: ARG001
        assert isinstance(layer, QuantizedLayer)
        return corrections[layer].apply(layer, output) if layer.bias is not None or layer in reader else None

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for batch in batches:
        with _hooks([m.register_forward_hook(observe) for m in layers]):
            with _hooks([m.register_forward_pre_hook(find_reader) for m in norms]):
                run_in_float(model, [batch])
        with _hooks([m.register_forward_hook(apply) for m in layers]):
            run_quantized(model, [batch])
        for correction in corrections.values():
            correction.float_means.clear()  # of layers with nothing to correct
    if not any(correction.count for correction in corrections.values()):
        raise ValueError(
            "correct_biases: nothing was corrected; expected at least one batch of model inputs, and a layer with a "
            "bias or a BatchNorm behind it."
        )
    for layer, correction in corrections.items():
        if correction.count and layer.bias is not None:
            layer.bias.add_(correction.shift / correction.count)
        elif correction.count:
            running_mean = reader[layer].running_mean
            assert running_mean is not None
            running_mean.sub_(correction.shift / correction.count)
    return model


@contextmanager
def _hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

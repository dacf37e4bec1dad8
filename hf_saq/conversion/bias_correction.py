"""Correct biases: take the mean error of quantization out of each layer's output.

Rounding moves the mean of an output by `E[Q(W) Q(x)] - E[W x]`, most where inputs are far from zero mean, as behind a
ReLU, and where few weights make an output, as in depthwise convolutions. Nagel et al., arXiv:1906.04721, Section 4.2,
here with means measured on data and layers corrected in the order they run, as in that paper's appendix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..layers import QuantizedLayer
from ..quantizers import in_double, where_double_is
from .forms import refuse_uncalibrated
from .observing import run_in_float, run_quantized
from .observing.alike import add_over_processes


class _Shift:
    """Adds up how far outputs must move in the mean, for one bias or one running mean.

    Args:
        like: The bias or the running mean.
    """

    def __init__(self, like: Tensor):
        self.total = in_double(torch.zeros(len(like) + 1, device=like.device))  # the last one counts values

    def add(self, shift: Tensor, values: int) -> None:
        self.total[:-1] += shift * values
        self.total[-1] += values

    @property
    def mean(self) -> Tensor:
        return self.total[:-1] / self.total[-1]


class _Call(NamedTuple):
    """Holds what one call of a layer gave in float: its mean output, and the holder of what can move it, if any."""

    mean: Tensor
    holder: QuantizedLayer | _BatchNorm | None


def _channel_means(layer: QuantizedLayer, output: Tensor) -> Tensor:
    by_channel = output.movedim(layer.output_channel_axis, 0).flatten(1)
    return where_double_is(by_channel).mean(dim=1, dtype=torch.float64)


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Shift the biases of a calibrated `model`, in place, so that its layers' mean outputs are those in float.

    Meant for using a model as it is after `calibrate`; training does the same by itself. Layers are corrected one
    after the other, each at the inputs that the corrected layers before it give. What is missing is added to a layer's
    bias or, where it has none, taken off the running mean of the BatchNorm that reads its output; layers with neither
    stay as they are. No tensor is added, so that checkpoints keep their form. Costs two evaluation passes per batch.
    Each batch is corrected by itself and the mean is kept, so larger batches are better than many.

    A layer that is used several times, with a BatchNorm of its own behind each use, moves the running mean of each by
    what is missing in that use; a bias moves by the mean over all uses.

    Where torch.distributed is initialized, all processes must call this, each with batches of its own: all end with
    the same, as if one process had run all batches.

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
    refuse_uncalibrated(model, "correct_biases")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    shifts: dict[nn.Module, _Shift] = {layer: _Shift(layer.bias) for layer in layers if layer.bias is not None}
    shifts |= {norm: _Shift(norm.running_mean) for norm in norms}  # type: ignore[arg-type]
    calls: dict[QuantizedLayer, list[_Call]] = {layer: [] for layer in layers}  # of one batch, in order
    latest: list[tuple[Tensor, QuantizedLayer]] = []  # the last output of a layer without a bias

    def observe(layer: nn.Module, args: tuple, output: Tensor) -> None:  # noqa: ARG001
        assert isinstance(layer, QuantizedLayer)
        calls[layer].append(_Call(_channel_means(layer, output), layer if layer.bias is not None else None))
        latest[:] = [(output, layer)] if layer.bias is None else []

    def find_reader(norm: nn.Module, args: tuple) -> None:
        assert isinstance(norm, _BatchNorm)
        if args and latest and args[0] is latest[0][0]:  # one layer may have another norm in each of its uses
            calls[latest[0][1]][-1] = calls[latest[0][1]][-1]._replace(holder=norm)

    def apply(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:  # noqa: ARG001
        """Give the quantized output its means in float, so that later layers see no error of this one."""
        assert isinstance(layer, QuantizedLayer)
        in_float = calls[layer].pop(0)
        if in_float.holder is None:
            return None
        shift = in_float.mean - _channel_means(layer, output)
        shifts[in_float.holder].add(shift, output.numel() // len(shift))
        along_channels = [1] * -(layer.output_channel_axis + 1)
        return output + shift.view(-1, *along_channels).to(output)

    for batch in batches:
        with _hooks([m.register_forward_hook(observe) for m in layers]):
            with _hooks([m.register_forward_pre_hook(find_reader) for m in norms]):
                run_in_float(model, [batch])
        with _hooks([m.register_forward_hook(apply) for m in layers]):
            run_quantized(model, [batch])
        for of_layer in calls.values():
            of_layer.clear()
    add_over_processes([shift.total for shift in shifts.values()])
    moved = {holder: shift.mean for holder, shift in shifts.items() if shift.total[-1] > 0}
    if not moved:
        raise ValueError(
            "correct_biases: nothing was corrected; expected at least one batch of model inputs, and a layer with a "
            "bias or a BatchNorm behind it."
        )
    for holder, mean in moved.items():
        if isinstance(holder, _BatchNorm):
            holder.running_mean.sub_(mean.to(holder.running_mean))  # type: ignore[union-attr]
        else:
            holder.bias.add_(mean.to(holder.bias))  # type: ignore[operator,arg-type]
    return model


@contextmanager
def _hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

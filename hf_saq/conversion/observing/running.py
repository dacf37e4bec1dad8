"""Run a model on batches in evaluation mode: as it is, in float, or with observers in place of its quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.as_written import run_as_written
from ...progress import with_progress
from ...quantizers import Observer, Quantizer
from .batch_inputs import check_keys, check_positions
from .observers import PassThrough


def run_in_float(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run `model` on `batches` in evaluation mode, with every quantizer that it still has passed by."""
    run_observed(model, batches, {m: PassThrough() for m in model.modules() if isinstance(m, Quantizer)})


def run_quantized(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run `model` on `batches` in evaluation mode, as it is."""
    run_observed(model, batches, {})


@torch.no_grad()
def run_observed(
    model: nn.Module,
    batches: Iterable[Any],
    observers: Mapping[Quantizer, Observer],
    run: Callable[[Any], Any] | None = None,
) -> int:
    """Run in evaluation mode while each quantizer shows its input to its observer; returns the number of batches.

    Args:
        run: Runs the model on one batch; by default the model is called with it.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    count = 0
    try:
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        with run_as_written():  # callers may have put hooks on layers
            for batch in with_progress(batches, "running batches"):
                run_on_device(model, batch) if run is None else run(batch)
                count += 1
    finally:
        for quantizer in observers:
            quantizer.observer = None
        for module, training in was_training.items():
            module.training = training
    return count


def run_on_device(model: nn.Module, batch: Any) -> None:
    """Call `model` with `batch`, moved to the device of its parameters.

    Args:
        batch: A tensor, a tuple or list of positional inputs, or a dict of keyword inputs.

    Raises:
        ValueError: If it is of another type, or its keys or positions are not those of the model's inputs.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, Mapping):
        check_keys(model, batch, "`batches`")
        model(**{name: _to(value, device) for name, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        check_positions(model, batch, "`batches`")
        model(*[_to(value, device) for value in batch])
    else:
        raise ValueError(
            f"`batches` holds a {type(batch).__name__}; expected a tensor, a tuple of positional inputs, or a "
            "dict of keyword inputs of the model."
        )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

"""Find first values of activation quantizers from real batches run through the float model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import HoldsQuantizers
from ..layers.wrapping import refuse_adapters
from ..quantizers import Quantizer, in_double
from .batch_norm_statistics import batches_where_statistics_are_new
from .forms import check_has_values
from .observing import ActivationObserver, PassThrough, fit_alike, names_of_first_process, reshard, run_observed
from .report import ConversionReport, note_signs
from .swapping import leave_in_float

CUT_ENERGY = 0.1
"""Share of the squares of an activation in its negative values from which on it is told of that they are cut off."""
NEVER_RUN = "the model never calls this layer: its weight is read directly, or has no part in the output"


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    *,
    only_missing: bool = False,
) -> nn.Module:
    """Fit every activation quantizer of `model`, in place, to what it sees while the model runs in float.

    The model runs in evaluation mode without gradients, its mode is restored afterwards. Weights run unquantized, and
    batch norms that have no running statistics yet, as those of a fresh head, normalize by each batch, so that the
    ranges belong to the function that training starts from.

    A quantized layer that the model never calls goes back to float, with a warning: a parent that reads
    `layer.weight` itself passes the quantizers by, and the model would not be what its report says. This holds for
    weight-only quantization too, which needs no calibration otherwise. Such layers are from then on listed in the
    report and in `model.config.quantization_config.modules_to_not_convert`, so that saved models load as they are.

    Where torch.distributed is initialized, all processes must call this, each with batches of its own if it likes:
    ranges and signs are those of the first process everywhere, also of parameters that FSDP2 shards. A sample of fixed
    size is kept for each quantizer, however many batches there are. A quantizer that sees one value alone, or is
    unsigned by `activation_mode` and cuts off much that is negative, is named in a warning.

    Args:
        model: A quantized model.
        batches: Model inputs, each a tensor, a tuple or list of positional inputs, or a dict of keyword inputs; they
            are moved to the model's device. A few batches are enough.
        run: Runs the model on one batch, where calling the model with it is not the way: a loss with labels, for
            example. Batches may then be of any type.
        only_missing: Whether quantizers that have a range keep it, which training may have learned: after a layer was
            reset, replaced or given other bits.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model is not quantized or is on the meta device, if there is no batch, if a batch has
            another type, does not fit the model's inputs, is empty or makes activations infinite or NaN, or if no
            quantized layer was run.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise ValueError(f"calibrate: `batches` is a {type(batches).__name__}; expected a list of batches.")
    refuse_adapters(model, "calibrate")
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    observers = {
        quantizer: ActivationObserver(quantizer.path)
        for quantizer in quantizers
        if quantizer.role == "activation" and not (only_missing and quantizer.initialized)
    }
    attached_to = {quantizer: observers.get(quantizer, PassThrough()) for quantizer in quantizers}
    if not quantizers and not hasattr(model, "quantization_report"):
        raise ValueError(f"calibrate: {type(model).__name__} has no quantizer; call `quantize(model, config)` first.")
    check_has_values(model)
    with batches_where_statistics_are_new(model):
        count = run_observed(model, batches, attached_to, run)
    if count == 0:
        raise ValueError("calibrate: `batches` is empty; expected at least one batch of model inputs.")
    _leave_idle_layers_in_float(model, {quantizer for quantizer, observer in attached_to.items() if observer.ran})
    remaining = set(model.modules())
    seen = {quantizer: observer for quantizer, observer in observers.items() if quantizer in remaining}
    empty = [q.path.removesuffix(".activation_quantizer") for q, observer in seen.items() if not observer.samples]
    if empty:
        raise ValueError(
            f"calibrate: the model ran the quantized layers {empty} on no value, so their activations have no range. "
            "Give batches that are not empty."
        )
    _warn_of_constant_inputs(seen)
    _warn_of_negative_values(seen)
    reshard(model)
    fit_alike((quantizer, torch.cat(observer.samples), observer.minimum) for quantizer, observer in seen.items())
    note_signs(model)
    report = getattr(model, "quantization_report", None)
    if isinstance(report, ConversionReport):
        report.idle_layers_are_known = True
    return model


def _warn_of_constant_inputs(seen: Mapping[Quantizer, ActivationObserver]) -> None:
    constant = [f"{q.path} ({observer.minimum:g})" for q, observer in seen.items() if observer.is_constant]
    if constant:
        warnings.warn(
            f"calibrate: {len(constant)} of {len(seen)} quantizers saw a single value in all batches, which gives no "
            "range: whatever differs from it later may be cut off. They are, with the value: "
            f"{', '.join(constant)}. Give batches of real inputs; a layer that is zero in a fresh model should be "
            "calibrated after some training, or left in float (modules_to_not_convert).",
            stacklevel=4,
        )


def _warn_of_negative_values(seen: Mapping[Quantizer, ActivationObserver]) -> None:
    """Name quantizers that are unsigned because they were told to, and get much that is negative."""
    cut = {}
    for quantizer, observer in seen.items():
        if quantizer.settings.signed is False and observer.minimum < 0:
            values = in_double(torch.cat(observer.samples))
            cut[quantizer.path] = (values.clamp(max=0).square().sum() / values.square().sum()).item()
    told = [f"{path} ({share:.0%})" for path, share in cut.items() if share >= CUT_ENERGY]
    if told:
        warnings.warn(
            f"calibrate: {len(told)} of {len(seen)} quantizers are unsigned, as activation_mode='unsigned' says, and "
            "cut off the negative values of what they see. These are, with their share of its squares: "
            f"{', '.join(told)}. Images are normalized to values of both signs. Use activation_mode='auto', or "
            "`overrides` for these layers.",
            stacklevel=4,
        )


def _leave_idle_layers_in_float(model: nn.Module, ran: set[Quantizer]) -> None:
    """Give up the quantization of layers and attention products with no quantizer among those that `ran`."""
    idle = []
    working = 0
    for name, layer in model.named_modules():
        if isinstance(layer, HoldsQuantizers):
            own = layer.own_quantizers()
            if getattr(layer, "shared_input", None) is not None:  # that of activations runs for others too
                own = [quantizer for quantizer in own if quantizer.role == "weight"]
            working += bool(ran.intersection(own))
            if own and ran.isdisjoint(own):
                idle.append(name)
    idle = names_of_first_process(idle)
    if idle and not working:
        raise ValueError(
            f"calibrate: {type(model).__name__} ran none of its {len(idle)} quantized layers, for example {idle[:3]}. "
            "Pass batches of what the model classifies, through the model that was quantized."
        )
    if idle:
        leave_in_float(model, idle, NEVER_RUN)
        warnings.warn(
            f"calibrate: {len(idle)} of {len(idle) + working} layers stay in float, because {NEVER_RUN}. They are: "
            f"{', '.join(idle)}. List them in modules_to_not_convert to say that this is intended.",
            stacklevel=4,
        )


def needs_calibration(model: nn.Module) -> bool:
    """Tell whether a quantizer has no range yet, or whether it is not known which layers are never called.

    Without activation quantizers nothing else would tell of such layers, so that weight-only models are run once.
    """
    if not is_calibrated(model):
        return True
    roles = {module.role for module in model.modules() if isinstance(module, Quantizer)}
    report = getattr(model, "quantization_report", None)
    return roles == {"weight"} and not (isinstance(report, ConversionReport) and report.idle_layers_are_known)


def is_calibrated(model: nn.Module) -> bool:
    """Tell whether every quantizer of `model` has its range."""
    return all(module.initialized for module in model.modules() if isinstance(module, Quantizer))

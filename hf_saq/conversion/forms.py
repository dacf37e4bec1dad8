"""Bring whole models from one form to another: their trainable, packed and plain float forms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..config import EXPORT_RECORD, QUANT_METHOD, SAQQuantizationConfig
from ..layers import PackedLayer, QuantizedLayer
from ..layers.float_form import HOOKS
from ..layers.shared_input import QUANTIZER, refuse_orphaned_inputs
from ..layers.wrapping import (
    drop_hooks_that_stay_behind,
    refuse_adapters,
    refuse_compiled_parts,
    replaced_forward,
    runs_another_module,
    without_wrappers,
)
from ..progress import with_progress
from ..quantizers import Quantizer
from . import attention_interface
from .report import ConversionReport
from .swapping import convert, note_replaced_layers, replace_modules


def pack(model: nn.Module) -> nn.Module:
    """Copy a quantized model with packed integers as weights: small on disk and in memory, for inference only.

    The latent float weights are dropped; keep a float-storage checkpoint to go on training. Of a model that is wrapped
    by DDP, DataParallel or `torch.compile`, the one inside is copied; so do `unpack` and `dequantize`.

    Raises:
        ValueError: If the model has no quantized weight, has adapters of peft, or is on the meta device.
        RuntimeError: If a quantizer has no range yet: the model is not calibrated.
    """
    model = without_wrappers(model)
    refuse_adapters(model, "pack")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer) and m.weight_quantizer is not None]
    if not layers:
        found = "is packed already" if is_packed(model) else "has no layer with quantized weights"
        raise ValueError(f"{type(model).__name__} {found}; expected a model made by `quantize` or `from_pretrained`.")
    check_has_values(model)
    _check_weights_are_parameters(model)
    note_replaced_layers(model)
    _warn_of_layers_that_are_gone(model)
    refuse_uncalibrated(model, "pack")
    with torch.no_grad():
        stand_ins: dict[nn.Module, nn.Module] = {
            layer: PackedLayer.from_quantized(layer) for layer in with_progress(layers, "packing")
        }
        packed = copy_with(model, stand_ins)
    _set_storage(packed, "packed")
    return packed.eval()


def unpack(model: nn.Module) -> nn.Module:
    """Copy a packed model so that it can be trained: float weights that quantize to the very same codes.

    The weights lie on the grid (with LIQ all of a layer next to it, by less than half a step); what was lost in
    packing, where between two grid values they were, does not come back.

    Raises:
        ValueError: If the model is not packed, or if the quantizer of a layer cannot be brought back to its grid.
    """
    model = without_wrappers(model)
    refuse_adapters(model, "unpack")
    if not is_packed(model):
        raise ValueError(
            f"{type(model).__name__} is not packed; expected a model made by `pack` or a packed checkpoint."
        )
    check_has_values(model)
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    unpacked = copy_with(model, {layer: layer.to_quantized() for layer in layers})
    _set_storage(unpacked, "float")
    return unpacked


def dequantize(model: nn.Module) -> nn.Module:
    """Copy a quantized or packed model as plain float, with every layer of the class it had before `quantize`.

    Its weights are the quantized ones, as floats. **Inputs of layers are no longer quantized**, nor are attention
    products, so that its outputs are those of the quantized model only where `activation_bits` was `None`. The copy
    needs no hf_saq: what its `save_pretrained` writes is an ordinary checkpoint.

    Raises:
        ValueError: If no layer is quantized, or if two layers that the model declares as tied were quantized to
            different weights.
        RuntimeError: If a weight quantizer was never initialized.
    """
    model = without_wrappers(model)
    with torch.no_grad():
        restored = copy_with(model, _float_layers(model))
    _forget_quantization(restored)
    return restored


def dequantize_in_place(model: nn.Module) -> None:
    """Do what [`dequantize`] does without the copy, for `model.dequantize()` of transformers."""
    with torch.no_grad():
        replace_modules(model, _float_layers(model))
    _forget_quantization(model)


def convert_to_packed(model: nn.Module, config: SAQQuantizationConfig) -> ConversionReport:
    """Swap the layers of a float `model`, in place, for packed ones whose codes are still to be loaded."""
    report = convert(model, config, stored=True)
    replace_modules(
        model,
        {
            layer: PackedLayer.skeleton(layer)
            for layer in model.modules()
            if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None
        },
    )
    return report


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLayer) for module in model.modules())


def copy_with(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy `model` deeply with other modules in place of some; what those share with the originals is copied too.

    Raises:
        ValueError: If something that was put around a module would not be there any more, or would run the original.
    """
    _check_wrappers(model, replacements)
    # Do not copy what is replaced: it would be the largest part of the model.
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    copied = copy.deepcopy(model, memo)
    for old, new in replacements.items():
        shared = {*old.parameters(recurse=False), *old.children()}
        for tensors_or_modules in (new._parameters, new._modules):
            for name, value in tensors_or_modules.items():
                if value is not None and value in shared:
                    tensors_or_modules[name] = copy.deepcopy(value, memo)  # type: ignore[assignment]
        not_registered = [name for name in (QUANTIZER, "shared_input") if name in vars(new)]
        vars(new).update({name: copy.deepcopy(vars(new)[name], memo) for name in (*HOOKS, *not_registered)})
    drop_hooks_that_stay_behind(copied)
    return copied


def _check_wrappers(model: nn.Module, replaced: Collection[nn.Module]) -> None:
    """Raise where a copy would go without what was put around a layer, or would go on running the original."""
    refuse_compiled_parts(model, "copying a model in another form")
    for name, module in model.named_modules():
        if module in replaced and (reason := replaced_forward(module)):
            raise ValueError(f"{name}: {reason}.")
        if runs_another_module(module):
            raise ValueError(
                f"{name or type(model).__name__}: its forward was replaced on the instance by a function that holds "
                "on to the module, so that a copy would run the original. Undo it before, and wrap the copy."
            )


def _check_weights_are_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        computed = [of for of in ("weight", "bias") if of not in module._parameters]
        if isinstance(module, QuantizedLayer) and computed:
            raise ValueError(
                f"{name}: its {computed[0]} is computed from other parameters since it was quantized (pruning, weight "
                "or spectral norm). Make that permanent first: `torch.nn.utils.prune.remove`, `remove_weight_norm` "
                "and the like."
            )


def _warn_of_layers_that_are_gone(model: nn.Module) -> None:
    report = getattr(model, "quantization_report", None)
    names = {name for name, _ in model.named_modules()}
    planned = [p.name for p in report.converted] if isinstance(report, ConversionReport) else []
    gone = [name for name in planned if name not in names]
    if gone:
        warnings.warn(
            f"pack: {len(gone)} of {len(planned)} quantized layers of {type(model).__name__} are gone, for example "
            f"{gone[0]}. Where others stand in for them (fused branches, timm's reparameterize_model), those are in "
            "float: fuse the float model, then quantize it.",
            stacklevel=3,
        )


def _float_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Build the float layer that stands in for each quantized one."""
    refuse_adapters(model, "dequantize")
    check_has_values(model)
    _check_weights_are_parameters(model)
    layers = [module for module in model.modules() if isinstance(module, (QuantizedLayer, PackedLayer))]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; expected a model made by `quantize`, `pack` or "
            "`from_pretrained`."
        )
    found: dict[nn.Module, nn.Module] = {}
    by_latent: dict[int, nn.Parameter] = {}
    for layer in layers:
        latent: Any = layer.weight
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is None:
            weight = latent
        else:
            weight = nn.Parameter(layer.quantized_weight(), requires_grad=latent.requires_grad or is_packed(layer))
            same = by_latent.setdefault(id(latent), weight)
            if torch.equal(same, weight):
                weight = same  # layers that share a weight go on sharing it
        found[layer] = layer.float_form.build(weight, like=layer)
    return found


def forget_export(model: nn.Module) -> None:
    """Take the record of a graph that lay beside a loaded model out of its configuration: what is saved has none."""
    getattr(getattr(model, "config", None), "__dict__", {}).pop(EXPORT_RECORD, None)


def _forget_quantization(model: nn.Module) -> None:
    """Leave no trace of hf_saq in a model whose layers are float again."""
    forget_export(model)
    attention_interface.unroute(model)
    for name in ("quantization_report", "quantization_method"):
        model.__dict__.pop(name, None)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]
    for module in model.modules():
        vars(module).pop("hf_quantizer", None)
        if "config" in vars(module):
            vars(module.config).pop("_is_quantized", None)  # transformers notes it in the config of every submodel
            found = vars(module.config).get("quantization_config")  # of a part it is a dict where it was loaded
            if isinstance(found, SAQQuantizationConfig) or (
                isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD
            ):
                del vars(module.config)["quantization_config"]
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        _tie(model, target, source)


def _tie(model: nn.Module, target: str, source: str) -> None:
    """Make the parameter `target` the one called `source`, as the model declares that it is."""
    first, second = model.get_parameter(source), model.get_parameter(target)
    if not torch.equal(first, second):
        raise ValueError(
            f"{type(model).__name__} ties {target} to {source}, but the two were quantized to different weights, "
            "which one float weight cannot be. Leave both in float (modules_to_not_convert)."
        )
    parent, _, name = target.rpartition(".")
    setattr(model.get_submodule(parent), name, first)


def check_has_values(model: nn.Module) -> None:
    """Raise `ValueError` if a parameter is on the meta device, or if values are no part of the model any more."""
    refuse_orphaned_inputs(model)
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"{type(model).__name__}: {name} has no values (device='meta'); load the model's weights first, or "
                "take accelerate's hooks off (remove_hook_from_module) if they keep the weights elsewhere."
            )


def refuse_uncalibrated(model: nn.Module, doing: str) -> None:
    """Raise `RuntimeError` if a quantizer has no range yet; `doing` names the function that needs it."""
    waiting = [q.path for q in model.modules() if isinstance(q, Quantizer) and not q.initialized]
    if waiting:
        raise RuntimeError(
            f"{doing}: {type(model).__name__} is not calibrated: {len(waiting)} quantizers have no range yet, for "
            f"example {waiting[0]}. Run `hf_saq.calibrate(model, batches)` first, or train with `SAQTrainer`, which "
            "does so."
        )


def _set_storage(model: nn.Module, storage: str) -> None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SAQQuantizationConfig):
        config.replace(storage=storage).attach_to(model)

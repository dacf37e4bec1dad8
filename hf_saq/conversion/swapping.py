"""Swap the layers of any `nn.Module` for quantized ones, in place, and report what was changed, skipped and why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import FORMAT_VERSION, SAQQuantizationConfig
from ..layers import QUANTIZED_LAYERS, HoldsQuantizers, PackedLayer
from ..layers.shared_input import let_go_of_shared_input, share_input
from ..layers.wrapping import refuse_compiled_parts
from . import attention_interface
from .building import build, build_products
from .first_scales import initialize_weight_quantizers
from .planning import plan, products_name
from .report import ConversionReport, note_signs
from .structure import first_layer, keep_fused_kernels_off, unsupported


def quantize(model: nn.Module, config: SAQQuantizationConfig) -> nn.Module:
    """Replace the linear and convolution layers of `model`, in place, by fake-quantized ones.

    The new layers share the parameters of the old. Weight scales get their first values here; activation quantizers
    wait for `calibrate`. Works on any module: models of transformers, timm, torchvision or your own. A model of
    transformers gets a copy of its configuration, which it may have had in common with others. With both
    `weight_bits` and `activation_bits` at `None` nothing changes. On the meta device quantizers stay without values
    until a state dict is loaded. With `quantize_attention` the attention products
    are quantized as well, wherever a model of transformers has them; its `attn_implementation` becomes `"saq"`.

    Args:
        model: The float model.
        config: How to quantize.

    Returns:
        `model` itself. The report is kept as `model.quantization_report`.

    Raises:
        ValueError: If the model is quantized already, has no layer that can be quantized, has no attention that can be
            and `quantize_attention` asks for it, or is wrapped by DDP; if it has parts wrapped by `torch.compile`,
            adapters of peft, lazy layers that have seen no batch, or layers whose `forward` something has replaced,
            as hooks of accelerate do; or if a field is out of range, or a name in `modules_to_not_convert` or a
            pattern in `overrides` matches no module.
        TypeError: If `config` is something else.
    """
    if not isinstance(config, SAQQuantizationConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a SAQQuantizationConfig.")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "quantize: the model is wrapped by DistributedDataParallel, which averages the gradients of parameters "
            "that it found then. It would miss the new step sizes, and every process would learn its own. Quantize "
            "`model.module`, and wrap it anew."
        )
    refuse_compiled_parts(model, "quantize")
    report = convert(model, config, fit=True)
    if report.converted and hasattr(getattr(model, "config", None), "model_type"):
        # a transformers model: save_pretrained stores it, from_pretrained acts on it
        as_decided(config, report).attach_to(model)
    elif report.converted:
        config.attach_to_parts(model)
    return model


def as_decided(config: SAQQuantizationConfig, report: ConversionReport) -> SAQQuantizationConfig:
    """Note in a copy of `config` what conversion decided, so that a stored model is not looked through again: a part
    of it alone looks different."""
    given, groups = config.first_last_modules, config.shared_input_modules
    return config.replace(
        first_last_modules=report.first_last_modules if given is None else given,
        shared_input_modules=report.shared_inputs if config.share_inputs and groups is None else groups,
        format_version=FORMAT_VERSION,
    )


def convert(
    model: nn.Module, config: SAQQuantizationConfig, stored: bool = False, fit: bool = False
) -> ConversionReport:
    """Swap the modules and nothing else: also works on the meta device, before any weight is loaded.

    Where it raises, `model` is as it was.

    Args:
        stored: Whether `config` was stored with a model, of which `model` may be the base or a part.
        fit: Whether to fit weight quantizers to the weights that are there.
    """
    report = plan(model, config, stored)
    layers = report.layers
    if not report.converted and (config.weight_bits is not None or config.activation_bits is not None):
        raise ValueError(
            f"{type(model).__name__}: no layer can be quantized. Expected at least one of "
            f"{[t.__name__ for t in QUANTIZED_LAYERS]}; found "
            + (", ".join(f"{p.name or p.layer_type} ({p.reason})" for p in layers) or "none of them")
            + "."
        )
    settings = {p.name: p.settings for p in report.converted}
    reads_input = None if config.learn_input_scale else first_layer(model)  # while its layers are in float
    replacements: dict[nn.Module, nn.Module] = {
        module: build(module, name, settings[name]) for name, module in model.named_modules() if name in settings
    }
    products: dict[nn.Module, nn.Module] = {}
    if config.quantize_attention:
        products = {
            module: build_products(module, products_name(name), settings[products_name(name)])
            for name, module in model.named_modules()
            if products_name(name) in settings
        }
        attention_interface.check_choices(model)
    if fit:
        initialize_weight_quantizers(
            model, {n: replacements[m] for n, m in model.named_modules() if m in replacements}
        )
    # Nothing below raises: a model that is changed half-way would be of no use.
    if fit and report.converted:  # `from_pretrained` has copied that of what it loads
        _part_configurations(model)
    replace_modules(model, replacements)
    keep_fused_kernels_off(model, replacements.values())
    for group in report.shared_inputs:
        share_input([model.get_submodule(name) for name in group])
    if reads_input in settings and settings[reads_input]["activation_bits"] is not None:
        model.get_submodule(reads_input).activation_quantizer.keep_as_calibrated()  # type: ignore[operator,union-attr]
    if config.quantize_attention:
        for attention, its_products in products.items():
            attention.add_module(attention_interface.CHILD, its_products)
        attention_interface.route(model)
    model.quantization_report = report  # type: ignore[assignment]
    if report.converted and hasattr(model, "add_model_tags"):
        model.add_model_tags(config.tags)  # type: ignore[operator]  # `model.push_to_hub` writes them into the card
    note_signs(model)
    return report


def _part_configurations(model: nn.Module) -> None:
    """Give `model` and all modules in it copies of their configurations, in place.

    Models that are built from one configuration hold the same object: what is written into it for one of them would
    be stored with the others too. What modules of `model` have in common, they have in common afterwards.
    """
    copies: dict[int, Any] = {}  # shared by all calls of `deepcopy`, so that nested configurations stay nested
    for module in model.modules():
        for name, value in vars(module).items():
            if hasattr(value, "model_type") and hasattr(value, "sub_configs"):  # a configuration of transformers
                vars(module)[name] = copy.deepcopy(value, copies)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement at every place that holds its original, so that shared modules stay shared."""
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in replacements:
                parent._modules[child_name] = replacements[child]


def leave_in_float(model: nn.Module, names: Collection[str], reason: str) -> None:
    """Take the quantizers of some layers away again, in place, and note it in the report and in the configuration.

    What is stored with the model then names these layers in `modules_to_not_convert`, so that it loads as it is now.
    """
    for name in names:
        leave_layer_in_float(model, name)
    note_left_in_float(model, names, reason)


def leave_layer_in_float(model: nn.Module, name: str) -> None:
    """Take the quantizers of one layer away, in place; layers that share its input keep theirs."""
    layer = model.get_submodule(name)
    assert isinstance(layer, HoldsQuantizers)
    shared = getattr(layer, "shared_input", None)
    if shared is not None:
        others = {
            n: m for n, m in model.named_modules() if m is not layer and getattr(m, "shared_input", None) is shared
        }
        report = getattr(model, "quantization_report", None)
        groups = report.shared_inputs if isinstance(report, ConversionReport) else []
        group = next((group for group in groups if name in group), [])
        in_order = [n for n in group if n in others] or list(others)  # as the layers will be looked for when loading
        let_go_of_shared_input(layer, [others[n] for n in in_order])
        if others:
            holder: Any = others[in_order[0]]
            holder.activation_quantizer.path = f"{in_order[0]}.activation_quantizer"
    layer.leave_in_float()


def note_replaced_layers(model: nn.Module) -> None:
    """Note that float layers which somebody put in place of quantized ones are in float, and warn of them.

    What is stored with the model then says so too, so that it loads as it is now.
    """
    report = getattr(model, "quantization_report", None)
    modules = dict(model.named_modules())
    replaced = [
        planned.name
        for planned in (report.converted if isinstance(report, ConversionReport) else [])
        if (module := modules.get(planned.name)) is not None
        and unsupported(module) is not None
        and not any(isinstance(m, (HoldsQuantizers, PackedLayer)) for m in module.modules())
    ]
    if not replaced:
        return
    note_left_in_float(model, replaced, "replaced by a float layer after quantization")
    warnings.warn(
        f"{type(model).__name__}: {', '.join(replaced[:3])} {'and others ' * (len(replaced) > 3)}took the place of "
        "quantized layers and stay in float. For other classes replace the head of the float model and quantize that, "
        "or load the quantized one with from_pretrained(..., num_labels=N, ignore_mismatched_sizes=True).",
        stacklevel=3,
    )


def note_left_in_float(model: nn.Module, names: Collection[str], reason: str) -> None:
    """Write into the report of `model` and into its configuration that it does not quantize these layers."""
    report = getattr(model, "quantization_report", None)
    for planned in report.layers if isinstance(report, ConversionReport) else []:
        if planned.name in names:
            planned.settings, planned.reason, planned.sign = {}, reason, "-"
    if isinstance(report, ConversionReport):
        left = [[name for name in group if name not in names] for group in report.shared_inputs]
        report.shared_inputs = [group for group in left if len(group) > 1]
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SAQQuantizationConfig) and names:
        excluded, found = config.modules_to_not_convert or [], config.modules_found_idle or []
        model.config.quantization_config = config.replace(  # type: ignore[union-attr]
            modules_to_not_convert=[*excluded, *(name for name in names if name not in excluded)],
            modules_found_idle=[*found, *(name for name in names if name not in found)],
        )

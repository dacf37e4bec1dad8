"""Swap the layers of any `nn.Module` for quantized ones, in place, and report what was changed, skipped and why."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import attention_interface
from .config import OVERRIDABLE, SAQQuantizationConfig
from .layers import (
    QUANTIZED_LAYERS,
    HoldsQuantizers,
    PackedLayer,
    QuantAttentionProducts,
    QuantizedLayer,
    quantized_form,
)
from .quantizers import Quantizer, check_activation_mode, quantizer_class

TOLERATED_ZERO_CHANNELS = 0.25
"""Share of a layer's output channels that may round to zero without a warning: at 2 bits a few always do."""

_SIGNED = {"auto": None, "signed": True, "unsigned": False, "affine": None}


@dataclass
class LayerPlan:
    """What is to happen to one layer. `settings` is empty and `reason` says why where it stays in float.

    The products of an attention count as a layer, which has no weight; `layer_type` is then that of the attention.
    `sign` is that of the activations: `auto` until they are calibrated.
    """

    name: str
    layer_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    sign: str = "-"


@dataclass
class ConversionReport:
    """What `quantize` did, layer by layer; `print(report)` shows a table."""

    layers: list[LayerPlan]

    @property
    def converted(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.settings]

    @property
    def skipped(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if not layer.settings]

    def __str__(self) -> str:
        rows = [("module", "type", "W", "A", "sign of A", "quantizer", "note")]
        for layer in self.layers:
            bits = [str(layer.settings.get(k) or "float") for k in ("weight_bits", "activation_bits")]
            if layer.settings and "weight_bits" not in layer.settings:
                bits[0] = "-"
            quantizer = layer.settings.get("quantizer", "-")
            rows.append((layer.name, layer.layer_type, *bits, layer.sign, quantizer, layer.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.converted)} layers quantized, {len(self.skipped)} left in float"])


def quantize(model: nn.Module, config: SAQQuantizationConfig) -> nn.Module:
    """Replace the linear and convolution layers of `model`, in place, by fake-quantized ones.

    The new layers share the parameters of the old. Weight scales get their first values here; activation quantizers
    wait for `calibrate`. Works on any module: models of transformers, timm, torchvision or your own. With both
    `weight_bits` and `activation_bits` at `None` nothing changes. With `quantize_attention` the attention products
    are quantized as well, wherever a model of transformers has them; its `attn_implementation` becomes `"saq"`.

    Args:
        model: The float model.
        config: How to quantize.

    Returns:
        `model` itself. The report is kept as `model.quantization_report`.

    Raises:
        ValueError: If the model is quantized already, has no layer that can be quantized, has no attention that can be
            and `quantize_attention` asks for it, or if a name in `modules_to_not_convert` or a pattern in `overrides`
            matches no module.
    """
    if not isinstance(config, SAQQuantizationConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a SAQQuantizationConfig.")
    report = convert(model, config)
    initialize_weight_quantizers(model)
    if report.converted and hasattr(getattr(model, "config", None), "model_type"):
        # a transformers model: save_pretrained stores it, from_pretrained acts on it
        model.config.quantization_config = config  # type: ignore[union-attr]
    return model


def convert(model: nn.Module, config: SAQQuantizationConfig) -> ConversionReport:
    """Swap the modules and nothing else: also works on the meta device, before any weight is loaded."""
    layers = plan(model, config)
    report = ConversionReport(layers)
    if not report.converted and (config.weight_bits is not None or config.activation_bits is not None):
        raise ValueError(
            f"{type(model).__name__}: no layer can be quantized. Expected at least one of "
            f"{[t.__name__ for t in QUANTIZED_LAYERS]}; found "
            + (", ".join(f"{p.name or p.layer_type} ({p.reason})" for p in layers) or "none of them")
            + "."
        )
    settings = {p.name: p.settings for p in report.converted}
    replacements: dict[nn.Module, nn.Module] = {
        module: build(module, name, settings[name]) for name, module in model.named_modules() if name in settings
    }
    replace_modules(model, replacements)
    if config.quantize_attention:
        for name, module in list(model.named_modules()):
            if products_name(name) in settings:
                module.add_module(
                    attention_interface.CHILD,
                    build_products(module, products_name(name), settings[products_name(name)]),
                )
        attention_interface.route(model)
    model.quantization_report = report  # type: ignore[assignment]
    if report.converted and hasattr(model, "add_model_tags"):
        model.add_model_tags(config.tags)  # type: ignore[operator]  # `model.push_to_hub` writes them into the card
    note_signs(model)
    return report


def note_signs(model: nn.Module) -> None:
    """Write into the report of `model` which signs its activations have by now."""
    report = getattr(model, "quantization_report", None)
    for planned in report.converted if isinstance(report, ConversionReport) else []:
        module = model.get_submodule(planned.name)
        if isinstance(module, QuantAttentionProducts):
            *others, probability = (
                _sign(getattr(module, f"{operand}_quantizer")) for operand in ("query", "key", "value", "probability")
            )
            planned.sign = f"{'/'.join(dict.fromkeys(others))}, probabilities {probability}"
        else:
            planned.sign = _sign(module.activation_quantizer)  # type: ignore[arg-type]


def _sign(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "-"
    if quantizer.has_offset:
        return "affine"
    signed = quantizer.signed if quantizer.initialized else quantizer.requested_signed
    return {None: "auto", True: "signed", False: "unsigned"}[signed]


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement at every place that holds its original, so that shared modules stay shared."""
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in replacements:
                parent._modules[child_name] = replacements[child]


def plan(model: nn.Module, config: SAQQuantizationConfig) -> list[LayerPlan]:
    """Decide for every layer whether and how it is quantized, in the order of `named_modules`."""
    if any(isinstance(m, (HoldsQuantizers, PackedLayer)) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has quantized layers already; start from the float model, or train on as it is."
        )
    names = [name for name, _ in model.named_modules() if name]
    attentions = _attentions(model) if config.quantize_attention else {}
    names += [products_name(name) for name in attentions]
    excluded = config.modules_to_not_convert or []
    _check_patterns("modules_to_not_convert", excluded, names)
    _check_patterns("overrides", config.overrides, names)
    edges = first_and_heads(model) if config.first_last_bits is not None else set()
    tied = _tied_to_something_else(model)

    layers: list[LayerPlan] = []
    for name, module in model.named_modules():
        layer = LayerPlan(name, type(module).__name__)
        if name in attentions:
            layers.append(_plan_products(name, module, config))
        reason = unsupported(module)
        if reason is None:
            continue
        layers.append(layer)
        if not name:
            layer.reason = "the model itself is a single layer; wrap it, for example in nn.Sequential"
        elif any(_matches(pattern, name) for pattern in excluded):
            layer.reason = "listed in modules_to_not_convert"
        elif reason or module in tied:
            layer.reason = reason or tied[module]
        else:
            settings = layer_settings(config, name, edge=name in edges)
            if settings["weight_bits"] is None and settings["activation_bits"] is None:
                layer.reason = "bits are None"
            else:
                layer.settings = settings
                layer.reason = "first layer or head" if name in edges else ""
    return layers


def products_name(name: str) -> str:
    """The name that the products of the attention module called `name` have, or would have."""
    return f"{name}.{attention_interface.CHILD}" if name else attention_interface.CHILD


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules that go through the attention interface, by name; raises if none of them can be quantized."""
    found = {name: m for name, m in model.named_modules() if attention_interface.uses_interface(m)}
    reasons = {name: attention_interface.unsupported(m) for name, m in found.items()}
    if not found or all(reasons.values()):
        others = [f"{n} ({type(m).__name__})" for n, m in model.named_modules() if _sounds_like_attention(m)]
        seen = [f"{name}: {reason}" for name, reason in reasons.items()]
        by_hand = f"{len(others)} attention modules that do not, for example {', '.join(others[:3])}"
        raise ValueError(
            f"{type(model).__name__}: quantize_attention=True, but no attention of this model can be quantized. "
            "Expected modules that go through transformers' attention interface; found "
            f"{'; '.join(seen[:3]) or (by_hand if others else 'no attention module')}. Set quantize_attention=False."
        )
    return found


def _sounds_like_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _plan_products(name: str, attention: nn.Module, config: SAQQuantizationConfig) -> LayerPlan:
    """Decide whether and how the products of one attention module are quantized; patterns may name that or them."""
    own_name = products_name(name)
    planned = LayerPlan(own_name, type(attention).__name__)
    planned.reason = attention_interface.unsupported(attention)
    if any(_matches(pattern, n) for pattern in config.modules_to_not_convert or [] for n in (name, own_name)):
        planned.reason = "listed in modules_to_not_convert"
    if not planned.reason:
        settings = layer_settings(config, name, own_name, edge=False)
        del settings["weight_bits"], settings["weight_granularity"]
        if settings["activation_bits"] is None:
            planned.reason = "bits are None"
        else:
            planned.settings = settings
    return planned


def unsupported(module: nn.Module) -> str | None:
    """Why a weighted layer stays in float: `""` if it can be quantized, `None` if it is not such a layer at all."""
    if quantized_form(module) is not None:
        return "" if isinstance(module.weight, nn.Parameter) else "its weight is computed from other parameters"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is read by the attention that holds it, which does not call the layer"
    for float_type in QUANTIZED_LAYERS:
        if isinstance(module, float_type):
            return f"a subclass of {float_type.__name__} may compute something else"
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are raw parameters of one fused function"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "this convolution has no quantized form"
    return None


def _tied_to_something_else(model: nn.Module) -> dict[nn.Module, str]:
    """Layers that share their weight with a module that cannot be quantized, such as an embedding, and the reason."""
    # transformers ties weights after loading them; until then it only lists which ones.
    source_of: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            source = parameters.get(source_of.get(f"{name}.{key}", ""), parameter)
            owners.setdefault(source, []).append((name, module))
    tied = {}
    for sharing in owners.values():
        others = [name for name, module in sharing if unsupported(module) != ""]
        if others and len(sharing) > 1:
            reason = f"its weight is shared with {others[0]}, which has no quantized form"
            tied.update({module: reason for _, module in sharing if unsupported(module) == ""})
    return tied


def layer_settings(config: SAQQuantizationConfig, *names: str, edge: bool) -> dict[str, Any]:
    """The fields that hold for one layer: the configuration, then the first/last rule, then overrides that match one
    of its names."""
    settings = {key: getattr(config, key) for key in OVERRIDABLE}
    if edge:
        for key in ("weight_bits", "activation_bits"):
            if settings[key] is not None:
                settings[key] = config.first_last_bits
    for pattern, values in config.overrides.items():
        if any(_matches(pattern, name) for name in names):
            settings.update(values)
    return settings


def first_and_heads(model: nn.Module) -> set[str]:
    """Names of the first layer and of the classification heads, found by structure.

    Heads are, in this order: what timm's `get_classifier` returns; what a transformers model keeps outside of its
    `base_model`; the last layer.
    """
    candidates = {name: module for name, module in model.named_modules() if unsupported(module) == ""}
    if not candidates:
        return set()
    heads = _timm_heads(model) or _outside_base_model(model)
    in_heads = {module for head in heads for module in head.modules()}
    names = {name for name, module in candidates.items() if module in in_heads} or {list(candidates)[-1]}
    body = [name for name in candidates if name not in names]
    return names | set(body[:1])


def _timm_heads(model: nn.Module) -> list[nn.Module]:
    for module in model.modules():
        get_classifier = getattr(module, "get_classifier", None)
        if callable(get_classifier):
            found = get_classifier()
            return [m for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, nn.Module)]
    return []


def _outside_base_model(model: nn.Module) -> list[nn.Module]:
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return []
    inside = set(base.modules())
    return [child for child in model.children() if child not in inside]


def build(layer: nn.Module, name: str, settings: dict[str, Any]) -> QuantizedLayer:
    """The quantized form of one float layer, its quantizers not yet initialized."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    make = quantizer_class(settings["quantizer"])
    form = quantized_form(layer)
    assert form is not None
    per_channel = tuple(size if axis == form.channel_axis else 1 for axis, size in enumerate(weight.shape))
    weight_quantizer: Quantizer | None = None
    activation_quantizer: Quantizer | None = None
    if settings["weight_bits"] is not None:
        weight_quantizer = make(
            settings["weight_bits"],
            role="weight",
            signed=True,
            scale_shape=per_channel if settings["weight_granularity"] == "channel" else (1,),
            scale_init=settings["scale_init"],
        ).to(weight.device)
        weight_quantizer.path = f"{name}.weight_quantizer"
    if settings["activation_bits"] is not None:
        activation_quantizer = _activation_quantizer(f"{name}.activation_quantizer", settings, weight.device)
    return form.from_float(layer, weight_quantizer, activation_quantizer)


def build_products(attention: nn.Module, name: str, settings: dict[str, Any]) -> QuantAttentionProducts:
    """The products of one attention module, their quantizers not yet initialized; `name` is theirs."""
    device = next((tensor.device for tensor in attention.parameters()), torch.device("cpu"))
    quantizers: dict[str, Quantizer | None] = {}
    for operand in ("query", "key", "value"):
        path = f"{name}.{operand}_quantizer"
        quantizers[f"{operand}_quantizer"] = _activation_quantizer(path, settings, device)
    # A softmax has no negative values, and the zero of a grid without offset is its most common one.
    probability = _activation_quantizer(
        f"{name}.probability_quantizer", {**settings, "activation_mode": "unsigned"}, device
    )
    products = QuantAttentionProducts(**quantizers, probability_quantizer=probability)
    products.path = name
    return products.train(attention.training)


def _activation_quantizer(path: str, settings: dict[str, Any], device: torch.device) -> Quantizer:
    where = f"{path.rpartition('.')[0]}: "
    check_activation_mode(where, settings["quantizer"], settings["activation_mode"])
    quantizer = quantizer_class(settings["quantizer"])(
        settings["activation_bits"],
        role="activation",
        signed=_SIGNED[settings["activation_mode"]],
        scale_init=settings["scale_init"],
    ).to(device)
    quantizer.path = path
    return quantizer


def leave_in_float(model: nn.Module, names: Collection[str], reason: str) -> None:
    """Take the quantizers of some layers away again, in place, and note it in the report and in the configuration.

    What is stored with the model then names these layers in `modules_to_not_convert`, so that it loads as it is now.
    """
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, HoldsQuantizers)
        layer.leave_in_float()
    report = getattr(model, "quantization_report", None)
    for planned in report.layers if isinstance(report, ConversionReport) else []:
        if planned.name in names:
            planned.settings, planned.reason, planned.sign = {}, reason, "-"
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SAQQuantizationConfig):
        excluded = config.modules_to_not_convert or []
        model.config.quantization_config = config.replace(  # type: ignore[union-attr]
            modules_to_not_convert=[*excluded, *(name for name in names if name not in excluded)]
        )


@torch.no_grad()
def initialize_weight_quantizers(model: nn.Module) -> None:
    """Fit every weight quantizer that has no range yet to the weight it will quantize.

    Warns where one scale for the whole tensor leaves nothing of many output channels, as in depthwise convolutions
    whose channels differ by orders of magnitude.
    """
    damaged = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            if not module.weight_quantizer.initialized:
                module.weight_quantizer.initialize(module.weight)
                zero, channels = channels_rounded_to_zero(module)
                if zero > TOLERATED_ZERO_CHANNELS * channels:
                    damaged.append(f"{name} ({zero} of {channels})")
    if damaged:
        warnings.warn(
            f"{type(model).__name__}: one weight scale for a whole tensor rounds all weights of many output channels "
            f"to zero, in {len(damaged)} layers: {', '.join(damaged)}. Use weight_granularity='channel', more "
            "weight_bits or `overrides` for these layers; otherwise training starts from a model that lacks these "
            "channels.",
            stacklevel=3,
        )


def channels_rounded_to_zero(layer: QuantizedLayer) -> tuple[int, int]:
    """How many output channels of a layer keep no weight other than zero although they have some, and of how many."""
    assert layer.weight_quantizer is not None
    channels = layer.weight.shape[layer.channel_axis]
    if layer.weight_quantizer.has_offset:
        return 0, channels  # code 0 does not stand for zero
    codes = layer.weight_quantizer.quantize(layer.weight).movedim(layer.channel_axis, 0).flatten(1)
    values = layer.weight.movedim(layer.channel_axis, 0).flatten(1)
    return int(((codes == 0).all(dim=1) & (values != 0).any(dim=1)).sum()), channels


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _check_patterns(where: str, patterns, names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise ValueError(
                f"{where}: {pattern!r} matches no module of the model. Expected a dotted module name, a prefix of "
                f"one, or a glob such as '*.layers.0.*'; the model has for example {names[:3]}."
            )

"""Decide which layers of a model are quantized and how, before anything is changed; and describe a quantized model so
that it would be decided again."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..config import OVERRIDABLE, SAQQuantizationConfig
from ..layers import HoldsQuantizers, PackedLayer, QuantAttentionProducts
from ..layers.shared_input import refers_to_anothers_quantizer
from ..layers.wrapping import refuse_adapters, replaced_forward
from ..quantizers import Quantizer
from . import attention_interface
from .building import settings_of
from .module_names import ModuleNames
from .report import ConversionReport, LayerPlan
from .shared_inputs import groups_to_share
from .structure import first_and_heads, tied_to_something_else, unsupported


def plan(model: nn.Module, config: SAQQuantizationConfig, stored: bool = False) -> ConversionReport:
    """Decide for every layer whether and how it is quantized, in the order of `named_modules`.

    Args:
        stored: Whether `config` was stored with a model, of which `model` may be the base or a part.
    """
    if any(isinstance(m, (HoldsQuantizers, PackedLayer)) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has quantized layers already; start from the float model, or train on as it is."
        )
    refuse_adapters(model, "quantize")
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(
            f"{type(model).__name__}: {lazy} has no shape yet, and its layer would stay in float; expected a model "
            "whose lazy layers have seen a batch. Run one through it before."
        )
    if not stored:
        config.replace()  # checks the fields, which may have been set one by one
    names = ModuleNames(model, only_where_needed=config.format_version == 1)
    attentions = _attentions(model) if config.quantize_attention else {}
    names.add(products_name(name) for name in attentions)
    excluded = config.modules_to_not_convert or []
    able = [name for name, module in model.named_modules() if name in attentions or unsupported(module) is not None]
    able += map(products_name, attentions)
    if not stored:
        names.check("modules_to_not_convert", excluded, able)
        names.check("overrides", config.overrides, able, are_needed=True)
    edges = _first_and_heads(model, config, names, stored, able)
    tied = tied_to_something_else(model)

    layers: list[LayerPlan] = []
    wrapped: list[str] = []
    for name, module in model.named_modules():
        layer = LayerPlan(name, type(module).__name__)
        if name in attentions:
            layers.append(_plan_products(name, module, config, names))
        reason = unsupported(module)
        if reason is None:
            continue
        layers.append(layer)
        if not name:
            layer.reason = "the model itself is a single layer; wrap it, for example in nn.Sequential"
        elif names.any_matches(excluded, name):
            layer.reason = "listed in modules_to_not_convert"
        elif reason or module in tied:
            layer.reason = reason or tied[module]
        elif replaced := replaced_forward(module):
            wrapped.append(f"{name}: {replaced}")
        else:
            settings = layer_settings(config, names, name, edge=name in (edges or ()))
            if settings["weight_bits"] is None and settings["activation_bits"] is None:
                layer.reason = "bits are None"
            else:
                layer.settings = settings
                layer.reason = "first layer or head" if name in (edges or ()) else ""
    if wrapped:
        raise ValueError(
            f"{type(model).__name__}: {len(wrapped)} of its layers cannot be replaced by quantized ones. "
            f"{'. '.join(wrapped[:3])}."
        )
    settings = {planned.name: planned.settings for planned in layers if planned.settings}
    return ConversionReport(
        layers, first_last_modules=edges, shared_inputs=groups_to_share(model, config, names, settings, stored)
    )


def _first_and_heads(
    model: nn.Module, config: SAQQuantizationConfig, names: ModuleNames, stored: bool, able: list[str]
) -> list[str] | None:
    """Name the first layer and the heads: as the configuration says, else found by structure; `None` if it is no
    matter which they are."""
    given = config.first_last_modules
    if config.first_last_bits is None and given and not stored:
        raise ValueError(
            f"first_last_modules={given!r} with first_last_bits=None: these layers are treated like the rest, so that "
            "naming them has no effect. Set first_last_bits to their bits, or first_last_modules=None."
        )
    if config.first_last_bits is None:
        return None
    if given is None:
        found = first_and_heads(model)
        return [name for name, _ in model.named_modules() if name in found]
    if stored:
        names.check_stored("first_last_modules", given)
    else:
        names.check("first_last_modules", given, able)
    return [name for name, _ in model.named_modules() if name and names.any_matches(given, name)]


def products_name(name: str) -> str:
    """Make the name that the products of the attention module called `name` have, or would have."""
    return f"{name}.{attention_interface.CHILD}" if name else attention_interface.CHILD


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Find attention modules that use the attention interface, by name; raise if none of them can be quantized."""
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


def _plan_products(name: str, attention: nn.Module, config: SAQQuantizationConfig, names: ModuleNames) -> LayerPlan:
    """Decide whether and how the products of one attention module are quantized; patterns may name that or them."""
    own_name = products_name(name)
    planned = LayerPlan(own_name, type(attention).__name__)
    planned.reason = attention_interface.unsupported(attention)
    if names.any_matches(config.modules_to_not_convert or [], name, own_name):
        planned.reason = "listed in modules_to_not_convert"
    if not planned.reason:
        settings = layer_settings(config, names, name, own_name, edge=False)
        del settings["weight_bits"], settings["weight_granularity"]
        if settings["activation_bits"] is None:
            planned.reason = "bits are None"
        else:
            planned.settings = settings
    return planned


def layer_settings(config: SAQQuantizationConfig, names: ModuleNames, *called: str, edge: bool) -> dict[str, Any]:
    """Find the fields that hold for one layer: those of the configuration, then the first/last rule, then overrides.

    Args:
        called: Names of the layer; an override counts if its pattern matches one of them.
        edge: Whether it is the first layer or a head.
    """
    settings = {key: getattr(config, key) for key in OVERRIDABLE}
    if edge:
        for key in ("weight_bits", "activation_bits"):
            if settings[key] is not None:
                settings[key] = config.first_last_bits
    for pattern, values in config.overrides.items():
        if names.any_matches([pattern], *called):
            settings.update(values)
    return settings


def configuration_of(model: nn.Module) -> SAQQuantizationConfig | None:
    """Describe how `model`, a part of a quantized model for example, is quantized, by the names that it has itself.

    Returns:
        A configuration by which [`plan`] decides as `model` is; `None` if it has no quantized layer.

    Raises:
        ValueError: If a quantizer is not a registered one.
    """
    holders = {n: m for n, m in model.named_modules() if isinstance(m, (HoldsQuantizers, PackedLayer))}
    found = {name: fields for name, layer in holders.items() if (fields := settings_of(layer))}
    if not found:
        return None
    products = [name for name in found if isinstance(holders[name], QuantAttentionProducts)]
    common = found[products[0] if products else next(iter(found))]
    overrides = {}
    for name, fields in found.items():
        own = [key for key in fields if not (name in products and key in ("weight_bits", "weight_granularity"))]
        if changed := {key: fields[key] for key in own if fields[key] != common[key]}:
            overrides[name] = changed
    in_float = [n for n, m in model.named_modules() if n not in found and (n in holders or unsupported(m) == "")]
    if products:
        attentions = [n for n, m in model.named_modules() if attention_interface.uses_interface(m)]
        in_float += [name for name in map(products_name, attentions) if name not in holders]
    groups = _shared_inputs(holders)
    return SAQQuantizationConfig(
        **common,
        first_last_bits=None,
        quantize_attention=bool(products),
        share_inputs=bool(groups),
        learn_input_scale=all(
            m.learned for holder in holders.values() for m in holder.children() if isinstance(m, Quantizer)
        ),
        shared_input_modules=groups or None,
        modules_to_not_convert=in_float or None,
        overrides=overrides,
        storage="packed" if any(isinstance(layer, PackedLayer) for layer in holders.values()) else "float",
    )


def _shared_inputs(layers: dict[str, Any]) -> list[list[str]]:
    """Name the layers that share an input, group by group, the one that holds the quantizer first."""
    groups: dict[Any, list[str]] = {}
    for name, layer in sorted(layers.items(), key=lambda pair: refers_to_anothers_quantizer(pair[1])):
        if getattr(layer, "shared_input", None) is not None:
            groups.setdefault(layer.shared_input, []).append(name)
    return [group for group in groups.values() if len(group) > 1]

"""Decide which layers of a model are quantized and how, before anything is changed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config import OVERRIDABLE, SAQQuantizationConfig
from ..layers import HoldsQuantizers, PackedLayer
from . import attention_interface
from .report import LayerPlan
from .structure import first_and_heads, tied_to_something_else, unsupported


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
    tied = tied_to_something_else(model)

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


def layer_settings(config: SAQQuantizationConfig, *names: str, edge: bool) -> dict[str, Any]:
    """Collect the fields that hold for one layer.

    They are those of the configuration, then of the first/last rule, then of overrides that match one of its names.
    """
    settings = {key: getattr(config, key) for key in OVERRIDABLE}
    if edge:
        for key in ("weight_bits", "activation_bits"):
            if settings[key] is not None:
                settings[key] = config.first_last_bits
    for pattern, values in config.overrides.items():
        if any(_matches(pattern, name) for name in names):
            settings.update(values)
    return settings


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _check_patterns(where: str, patterns, names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise ValueError(
                f"{where}: {pattern!r} matches no module of the model. Expected a dotted module name, a prefix of "
                f"one, or a glob such as '*.layers.0.*'; the model has for example {names[:3]}."
            )

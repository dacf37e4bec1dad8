"""Let transformers' attention interface and `QuantAttentionProducts` meet; importing the module registers it.

The attention modules of transformers make query, key and value themselves and leave the rest to a function that is
looked up by name, `config._attn_implementation`. Ours hands them to the child that a quantized module has for it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..layers import QuantAttentionProducts

IMPLEMENTATION = "saq"
"""Our name among the values of `attn_implementation`. It is not stored in `config.json`, but follows from it."""
CHILD = "products"
"""Name of the `QuantAttentionProducts` in the attention module it computes for."""

_REPLACED_SILENTLY = {None, "eager", IMPLEMENTATION}
"""Eager attention is what `QuantAttentionProducts` computes; any other implementation is somebody's wish."""
_EAGER_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "kwargs"}
_EAGER_NAMES = {"contiguous", "dropout", "dtype", "float32", "functional", "head_dim", "matmul", "nn", "repeat_kv"} | {
    "num_key_value_groups",
    "shape",
    "size",
    "softmax",
    "tanh",
    "to",
    "torch",
    "training",
    "transpose",
}
"""What an eager attention may take and use for `QuantAttentionProducts` to stand in for it. Sinks, biases that are
computed inside and the like are none of it."""


def register() -> None:
    """Make transformers know the implementation. Safe to call again."""
    AttentionInterface.register(IMPLEMENTATION, quantized_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with the products of `module`, or with its own eager attention where it has none."""
    arguments: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
    if softcap is not None:
        arguments["softcap"] = softcap
    products = module._modules.get(CHILD)
    if isinstance(products, QuantAttentionProducts):
        return products(query, key, value, attention_mask, **arguments)
    eager = _eager_attention(module)
    if eager is None:
        raise RuntimeError(
            f"{type(module).__name__} has neither quantized products nor an eager attention to fall back on; call "
            "`model.set_attn_implementation('sdpa')` if nothing of this model's attention is quantized."
        )
    return eager(module, query, key, value, attention_mask, **arguments, **kwargs)


# Finding attention modules ---------------------------------------------------------------------------------------


def uses_interface(module: nn.Module) -> bool:
    """Tell whether the forward of `module` looks its attention function up in the attention interface."""
    forward = inspect.unwrap(type(module).forward)
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return code is not None and any(isinstance(known.get(name), AttentionInterface) for name in _names(code))


def unsupported(module: nn.Module) -> str:
    """Say why a module for which `uses_interface` holds keeps its products in float; `""` if it need not."""
    eager = _eager_attention(module)
    if eager is None:
        return "its eager attention was not found, so what it computes is not known"
    further = sorted(set(inspect.signature(eager).parameters) - _EAGER_ARGUMENTS)
    further += sorted(set(_names(inspect.unwrap(eager).__code__)) - _EAGER_NAMES)
    return f"its attention is more than two products and a softmax: it has {', '.join(further)}" if further else ""


def _eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Find what the file of `module` calls eager attention: by convention a function of this name."""
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)


# Routing them to us ----------------------------------------------------------------------------------------------


def check_choices(model: nn.Module) -> None:
    """Raise, and tell of what will be replaced, as [`choose`] does for every configuration in `model`."""
    for submodel in _outermost(model):
        _check_choice(submodel.config, silently={*_REPLACED_SILENTLY, "sdpa"})  # sdpa is what a model gets unasked


def route(model: nn.Module) -> None:
    """Let every attention module of `model` that has quantized products use them, and no other implementation.

    Call [`check_choices`] before, while nothing is changed.
    """
    for submodel in list(_outermost(model)):
        submodel.config._attn_implementation = IMPLEMENTATION
        submodel.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        if isinstance(module._modules.get(CHILD), QuantAttentionProducts):
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and config._attn_implementation != IMPLEMENTATION:
                config._attn_implementation = IMPLEMENTATION  # no model of transformers around it takes care of that
            module.register_forward_pre_hook(_check_route)


def unroute(model: nn.Module) -> None:
    """Undo [`route`] and take the quantized products away: attention is again what transformers chooses unasked."""
    for submodel in list(_outermost(model)):
        if IMPLEMENTATION in _implementations(submodel.config):
            try:
                submodel.set_attn_implementation("sdpa")
            except ValueError:  # this model has no such implementation
                submodel.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module._modules.get(CHILD), QuantAttentionProducts):
            del module._modules[CHILD]
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is _check_route:
                    del module._forward_pre_hooks[key]
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and config._attn_implementation == IMPLEMENTATION:
                config._attn_implementation = "sdpa"  # an attention without a model of transformers around it


def compute_openly(model: nn.Module) -> None:
    """Let attention that goes through a fused function be computed by plain operations, in place.

    Graphs of other engines get fewer nodes by it: what a fused function does about rows that are masked entirely is
    not among them. Quantized products stay as they are.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and IMPLEMENTATION not in _implementations(module.config):
            try:
                module.set_attn_implementation("eager")
            except ValueError:  # the model has this one implementation only
                continue
        elif isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # type: ignore[assignment]  # timm


def choose(config: PreTrainedConfig, silently: set[str | None] = _REPLACED_SILENTLY) -> None:
    """Set the implementation in `config` and all that is nested in it. What is replaced is told, except `silently`."""
    _check_choice(config, silently)
    config._attn_implementation = IMPLEMENTATION


def _check_choice(config: PreTrainedConfig, silently: set[str | None]) -> None:
    if config.output_attentions:
        raise ValueError(
            "config.output_attentions=True with quantize_attention=True: transformers allows it for eager attention "
            "only. Pass output_attentions=True to the model's forward instead."
        )
    replaced = sorted(_implementations(config) - silently, key=str)
    if replaced:
        warnings.warn(
            f"attn_implementation={', '.join(map(repr, replaced))} is replaced by {IMPLEMENTATION!r}: with "
            "quantize_attention=True the attention products are quantized, which no other implementation does.",
            stacklevel=4,
        )


def _outermost(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Find the models of transformers in `model`, without those inside of another one."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield module


def _implementations(config: PreTrainedConfig) -> set[str | None]:
    nested = (getattr(config, name, None) for name in config.sub_configs)
    found = {config._attn_implementation}
    return found.union(*(_implementations(one) for one in nested if isinstance(one, PreTrainedConfig)))


def _check_route(module: nn.Module, args: tuple) -> None:  # noqa: ARG001 (a forward pre-hook)
    """Raise where another implementation would pass the quantizers by."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", IMPLEMENTATION)
    if implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"{module._modules[CHILD].path}: attn_implementation is now {implementation!r}, which passes quantized "  # type: ignore[union-attr]
            f"products by. Call `model.set_attn_implementation({IMPLEMENTATION!r})`."
        )


register()

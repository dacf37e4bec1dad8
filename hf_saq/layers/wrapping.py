"""Find what others have put around a layer: a `forward` of their own, hooks that watch one model alone."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

STAYS_BEHIND = "stays_behind"
"""Attribute, true, of hooks that belong to somebody who watches one model: copies in other forms go without them."""


def replaced_forward(module: nn.Module) -> str:
    """Tell who replaced `forward` on the instance `module`; `""` if nobody did."""
    if "_hf_hook" in vars(module):
        return (
            "accelerate's hooks replaced its forward (dispatch_model, device_map, cpu_offload); take them off with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) and put them on again afterwards"
        )
    own = vars(module).get("forward")
    back_again = isinstance(own, types.MethodType) and own.__self__ is module and own.__func__ is type(module).forward
    if own is not None and not back_again:  # accelerate leaves a bound method behind when its hooks are taken off
        return (
            "its forward was replaced on the instance, which a layer put in its place would not have; put the wrapper "
            "around it as a module of its own, or list it in modules_to_not_convert"
        )
    return ""


def runs_another_module(module: nn.Module) -> bool:
    """Tell whether a replaced `forward` of `module` keeps a module in a way that copying does not follow."""
    return _holds_a_module(vars(module).get("forward"))


def _holds_a_module(function: Any) -> bool:
    while isinstance(function, (types.MethodType, functools.partial)):  # a copy binds these anew
        function = function.__func__ if isinstance(function, types.MethodType) else function.func
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # still empty
            continue
        if isinstance(content, nn.Module) or isinstance(getattr(content, "__self__", None), nn.Module):
            return True
        if isinstance(content, types.FunctionType) and content is not function and _holds_a_module(content):
            return True
    return False


def is_function(value: Any) -> bool:
    """Tell whether `value` may run code of a certain module, so that no other layer may be given it."""
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


def refuse_adapters(model: nn.Module, doing: str) -> None:
    """Raise `ValueError` if peft put adapters into `model`: they stay in float beside quantized weights, and once they
    are merged, rounding takes most of them back."""
    found = [name for name, module in model.named_modules() if type(module).__module__.split(".")[0] == "peft"]
    if found:
        example = found[-1] or type(model).__name__
        raise ValueError(
            f"{doing}: {type(model).__name__} has adapters of peft, for example at {example}; "
            "expected a model without. "
            "Train them on the float model, call `merge_and_unload()`, then quantize what it returns."
        )


def refuse_compiled_parts(model: nn.Module, doing: str) -> None:
    """Raise `ValueError` if `torch.compile` put wrappers around modules inside of `model`: they rename its tensors, so
    that no saved file would fit a model without them."""
    found = [name for name, module in model.named_modules() if name and type(module).__name__ == "OptimizedModule"]
    if found:
        raise ValueError(
            f"{doing}: {found[0]} is wrapped by torch.compile, which gives its tensors other names ({found[0]}."
            "_orig_mod...); expected a model without such wrappers inside. Put the module back (`wrapper._orig_mod`) "
            "and compile it in place, `module.compile()`, after `quantize`; or compile the whole model."
        )


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return what `model` wraps if it only runs that: on several devices (DataParallel, DDP), or compiled. A copy in
    another form is of the model inside, whose names and configuration wrappers hide."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def drop_hooks_that_stay_behind(model: nn.Module) -> None:
    """Remove the marked hooks from all modules of `model`, a copy in another form."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "__func__", hook), STAYS_BEHIND, False):
                    del hooks[key]

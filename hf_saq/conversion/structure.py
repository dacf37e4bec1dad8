"""Find by a model's structure which layers can be quantized, which is the first and which are heads."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..layers import QUANTIZED_LAYERS, quantized_form


def first_and_heads(model: nn.Module) -> set[str]:
    """Find the names of the first layer and of the classification heads, found by structure.

    Heads are, in this order: what timm's `get_classifier` returns; what a transformers model keeps outside of its
    `base_model`, but for embeddings before it; what projects the features of text and images, or the last layers of
    both; the last layer, and those with as many outputs as the model has classes. Beside text the first layer is the
    first one of images.
    """
    heads, body = _heads_and_body(model)
    return heads | set(body[:1])


def first_layer(model: nn.Module) -> str | None:
    """Name the first layer, which reads the model's own input; `None` if none can be quantized but heads."""
    return next(iter(_heads_and_body(model)[1]), None)


def _heads_and_body(model: nn.Module) -> tuple[set[str], list[str]]:
    """Name the heads, and the layers that may be the first, in the order of the model."""
    candidates = {name: module for name, module in model.named_modules() if unsupported(module) == ""}
    if not candidates:
        return set(), []
    heads = _timm_heads(model) or _outside_base_model(model)
    in_heads = {module for head in heads for module in head.modules()}
    names = {name for name, module in candidates.items() if module in in_heads} or _of_no_base_model(model, candidates)
    body = [name for name in candidates if name not in names]
    if _reads_text(model):  # a tower of text has embeddings in place of a layer that sees raw values
        body = [name for name in body if isinstance(candidates[name], nn.modules.conv._ConvNd)] or body
    return names, body


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
    inside, children = set(base.modules()), dict(model.named_children())
    start = list(children.values()).index(base) if base in children.values() else -1
    # Do not take embeddings for a head: DINOv3 calls its encoder the base model, and has them before it.
    return [
        child
        for i, (name, child) in enumerate(children.items())
        if child not in inside and (i > start or "embed" not in name)
    ]


def _of_no_base_model(model: nn.Module, candidates: dict[str, nn.Module]) -> set[str]:
    """Name the heads of a model whose heads lie with its body."""
    towers = [set(child.modules()) for child in model.children() if hasattr(child, "main_input_name")]
    if not _reads_text(model) or len(towers) < 2:
        classes = getattr(getattr(model, "config", None), "num_labels", -1)
        inputs, outputs = ({n: _width(m, side) for n, m in candidates.items()} for side in ("in", "out"))
        if classes in inputs.values():  # a width inside of the model, by chance as large, says nothing
            classes = -1
        return {list(candidates)[-1], *(name for name, size in outputs.items() if size == classes)}
    lying = [[name for name, module in candidates.items() if module in tower] for tower in towers]
    return set(candidates).difference(*lying) or {names[-1] for names in lying if names}


def _width(layer: nn.Module, side: str) -> int | None:
    return getattr(layer, f"{side}_features", getattr(layer, f"{side}_channels", None))


def _reads_text(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", None) == "input_ids"


def unsupported(module: nn.Module) -> str | None:
    """Say why a weighted layer stays in float: `""` if it can be quantized, `None` if it is no such layer at all."""
    if quantized_form(module) is not None:
        present = [name for name in ("weight", "bias") if hasattr(module, name)]
        computed = [name for name in present if name in vars(module) or name not in module._parameters]
        return f"its {' and '.join(computed)} is computed from other parameters" if computed else ""
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


def keep_fused_kernels_off(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let encoder layers of torch call their layers where some of them are among `layers`.

    In evaluation without gradients they would read the weights of both linear layers and run a fused kernel in float.
    """
    layers = set(layers)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not set(module.modules()).isdisjoint(layers):
            module.activation_relu_or_gelu = 0  # asked for nothing but that kernel, whose activation is then unknown
        elif isinstance(module, nn.TransformerEncoder) and not set(module.modules()).isdisjoint(layers):
            module.use_nested_tensor = False  # inputs for that kernel alone


def tied_to_something_else(model: nn.Module) -> dict[nn.Module, str]:
    """Find layers that share their weight with a module that has no quantized form, such as an embedding; say so."""
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

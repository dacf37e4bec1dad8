"""Compare a batch with the inputs that a model takes, before a model fails without saying what came."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 6
"""Number of names that an error lists at most."""
LABELS = ("label", "labels", "target", "targets", "y")
"""Names of inputs that class indices are meant for."""


def check_keys(model: nn.Module, batch: Mapping[str, Any], who: str) -> None:
    """Raise `ValueError` if `batch` lacks an input that `model` needs, or has one that it does not take.

    Args:
        model: Its `forward` tells which inputs it takes. Models of transformers give all of them a default and name
            the one that they need in `main_input_name`.
        who: Who was given the batch, for the error.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return  # a wrapper that passes on what it gets
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.name in names and p.default is p.empty]
    main_input = getattr(model, "main_input_name", None)
    if main_input in names and main_input not in needed and "inputs_embeds" not in batch:
        needed.append(main_input)
    lacking = [name for name in needed if name not in batch]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    unknown = [] if takes_any else [name for name in batch if name not in names]
    if not lacking and not unknown:
        return
    what = f"lacks {_listed(lacking)}" if lacking else f"has {_listed(unknown)}, which the model does not take"
    raise ValueError(
        f"{who}: a batch with the keys {_listed(batch)} {what}. {type(model).__name__} takes {_listed(names)}. Name "
        "what the transform or the collator returns like that, or remove it; images are usually "
        f"{main_input or names[0]!r}."
    )


def check_positions(model: nn.Module, batch: Sequence[Any], who: str) -> None:
    """Raise `ValueError` if `model` does not take the values of `batch` as its first inputs, in their order.

    Class indices are refused in the place of another input too: the usual `(images, labels)` of a data loader would
    be images and a mask to models whose second input is one.

    Args:
        model: Its `forward` tells which inputs it takes.
        who: Who was given the batch, for the error.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return  # a wrapper that passes on what it gets
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    later = zip(names[1:], batch[1:], strict=False)  # either may be longer
    misplaced = [name for name, value in later if name not in LABELS and _are_classes(value, batch)]
    if len(batch) <= len(names) and not misplaced:
        return
    extra = any(_are_classes(value, batch) for value in batch[1:])
    what = "has class indices for " + _listed(misplaced) if misplaced else "has more values than the model has inputs"
    raise ValueError(
        f"{who}: a batch of {len(batch)} values {what}. {type(model).__name__} takes {_listed(names)}, in this order. "
        + ("Pass the images alone: `(images for images, labels in loader)`." if extra else "Pass its inputs alone.")
    )


def _are_classes(value: Any, batch: Sequence[Any]) -> bool:
    """Whether `value` is an integer for each sample of the first input."""
    integers = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return integers and isinstance(batch[0], Tensor) and value.shape == batch[0].shape[:1]


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

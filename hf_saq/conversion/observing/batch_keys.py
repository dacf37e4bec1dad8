"""Compare the keys of a batch with what a model takes, before a model fails without saying which keys came."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

SHOWN = 6
"""Number of names that an error lists at most."""


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


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

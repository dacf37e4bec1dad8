"""Read configurations of earlier versions of the format as the present one has them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from ..config import FORMAT_VERSION, SAQQuantizationConfig
from ..conversion.structure import first_and_heads


def first_last_modules_of(model: Any, config: SAQQuantizationConfig) -> list[str] | None:
    """Name what version 1, which did not store it, took for the first layer and the heads; `None` where they follow
    from the model itself, because it is of the class that was saved.

    Args:
        model: What the checkpoint is loaded as, still in float.
        config: As stored.
    """
    if config.format_version >= FORMAT_VERSION or config.first_last_bits is None or config.first_last_modules:
        return None
    saved = (getattr(model.config, "architectures", None) or [""])[0]
    kind = getattr(transformers, saved, None)
    if saved in (base.__name__ for base in type(model).__mro__) or not isinstance(kind, type):
        return None
    if not issubclass(kind, transformers.PreTrainedModel):
        return None
    plain = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        whole: nn.Module = kind(type(model.config).from_dict(plain))
    found = first_and_heads(whole)
    return [name for name, _ in whole.named_modules() if name in found]

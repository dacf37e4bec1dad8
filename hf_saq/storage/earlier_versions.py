"""Complete configurations that earlier versions of the format stored, as the present version has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import FORMAT_VERSION, SAQQuantizationConfig
from ..conversion.structure import first_and_heads


def first_last_modules_of(model: Any, config: SAQQuantizationConfig) -> list[str] | None:
    """Name what version 1 took for the first layer and the heads, which it did not store.

    Args:
        model: The model that the checkpoint is loaded into, still in float.
        config: The stored configuration.

    Returns:
        Names of modules. `None` where nothing is missing, or where they follow from the model itself because it is of
        the class that was saved.
    """
    if config.format_version >= FORMAT_VERSION or config.first_last_bits is None or config.first_last_modules:
        return None
    # Import it here and not above: models of transformers may not be loaded yet.
    from .saved_directory import named_model_class

    saved = (getattr(model.config, "architectures", None) or [""])[0]
    kind = named_model_class(saved)
    if kind is None or saved in (base.__name__ for base in type(model).__mro__):
        return None
    plain = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        whole: nn.Module = kind(type(model.config).from_dict(plain))
    found = first_and_heads(whole)
    return [name for name, _ in whole.named_modules() if name in found]

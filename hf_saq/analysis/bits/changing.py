"""Give the layers of a quantized model other bits, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...config import SAQQuantizationConfig
from ...conversion.report import ConversionReport
from ...layers import HoldsQuantizers
from ...layers.shared_input import SharedInput, give_readers, refers_to_anothers_quantizer
from ...quantizers import Quantizer


@torch.no_grad()
def change_bits(model: nn.Module, overrides: Mapping[str, Mapping[str, int]]) -> None:
    """Give layers new quantizers of other bits, and note it in the report and the configuration of `model`.

    Weight quantizers are fitted to the weights at once. New ones of activations wait for `calibrate`. What is saved
    from then on loads with these bits.

    Args:
        model: A quantized model that can be trained.
        overrides: Name of a layer -> `weight_bits`, `activation_bits` or both, as [`Allocation.overrides`] has them.

    Raises:
        ValueError: If a name is no quantized layer, the layer does not quantize that operand, or bits are none that
            there are. The model is then as it was.
    """
    changes: dict[tuple[nn.Module, str], Quantizer] = {}
    shared: dict[Any, dict[str, int]] = {}
    for name, fields in overrides.items():
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, HoldsQuantizers):
            raise ValueError(f"change_bits: {name} is no quantized layer of {type(model).__name__}.")
        for field, bits in fields.items():
            role = field.removesuffix("_bits")
            if role == "activation" and getattr(layer, "shared_input", None) is not None:
                shared.setdefault(layer.shared_input, {})[name] = bits
                continue
            own = [(child, q) for child, q in layer.named_children() if isinstance(q, Quantizer) and q.role == role]
            if not own:
                raise ValueError(f"change_bits: {name} does not quantize its {role}; it has no {field} to change.")
            for child, quantizer in own:
                if quantizer.bits != bits:
                    changes[layer, child] = with_bits(quantizer, bits, *([layer.weight] if role == "weight" else []))
    groups = []
    for one, bits_of in shared.items():
        layers, bits = _readers(model, one, bits_of)
        theirs: Any = layers[0].activation_quantizer
        if theirs.bits != bits:
            groups.append((layers, with_bits(theirs, bits)))
    # Begin to change the model when all that is wrong was found.
    for (layer, child), quantizer in changes.items():
        setattr(layer, child, quantizer)
    for layers, quantizer in groups:
        give_readers(layers, quantizer)
    report = getattr(model, "quantization_report", None)
    for planned in report.layers if isinstance(report, ConversionReport) else []:
        planned.settings.update(overrides.get(planned.name, {}))
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SAQQuantizationConfig):
        model.config.quantization_config = with_overrides(config, overrides)  # type: ignore[union-attr]


def _readers(model: nn.Module, shared: SharedInput, bits_of: Mapping[str, int]) -> tuple[list[nn.Module], int]:
    """Find the layers that share one input, the one that holds its quantizer first, and its one number of bits."""
    found = {name: m for name, m in model.named_modules() if getattr(m, "shared_input", None) is shared}
    if len(set(bits_of.values())) > 1 or set(bits_of) != set(found):
        raise ValueError(
            f"change_bits: {list(found)} read the same tensor and quantize it once, so that all of them need the same "
            f"activation_bits; found {dict(bits_of)}."
        )
    return sorted(found.values(), key=refers_to_anothers_quantizer), next(iter(bits_of.values()))


def with_overrides(config: SAQQuantizationConfig, overrides: Mapping[str, Mapping[str, Any]]) -> SAQQuantizationConfig:
    """Return a copy of `config` with these overrides after those that it has: the last one wins."""
    kept = dict(config.overrides)
    for name, fields in overrides.items():
        kept[name] = {**kept.pop(name, {}), **fields}
    return config.replace(overrides=kept)


def with_bits(quantizer: Quantizer, bits: int, *seen: Any) -> Quantizer:
    """Make a quantizer like `quantizer` with other bits, fitted to `seen`, what [`Quantizer.initialize`] takes.

    Without, it waits to be calibrated.
    """
    new = type(quantizer)(replace(quantizer.settings, bits=bits))
    new.to(quantizer.range_state.device).to(next(quantizer.parameters(), quantizer.range_state).dtype)
    new.path = quantizer.path
    new.train(quantizer.training)
    if not quantizer.learned:
        new.keep_as_calibrated()
    if seen:
        new.initialize(*seen)
    return new

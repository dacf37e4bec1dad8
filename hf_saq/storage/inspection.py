"""Find out what a saved quantized model is, from its `config.json` and its weight files, without loading it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..config import SAQQuantizationConfig
from ..conversion.forms import convert_to_packed
from ..conversion.report import ConversionReport, LayerPlan, float_parameters
from ..conversion.swapping import convert
from ..layers import PackedLayer, QuantizedLayer
from .inspection_report import StoredLayer, StoredModel
from .saved_directory import damage_named, has_processor, local_directory, model_class, stored_config
from .stored_tensors import StoredTensors, names_on_disk


def inspect_checkpoint(source: str, revision: str | None = None) -> StoredModel:
    """Read the configuration, the sizes and the scales of each layer of a saved model; read no other weights.

    Args:
        source: Directory of a saved model, packed or in float storage, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.

    Raises:
        ValueError: If it is not a model that hf_saq saved, a file cannot be read, or `config.json` and the weight
            files are those of different models.
        OSError: If the Hub refuses or cannot be reached.
    """
    directory = local_directory(source, revision)
    config = stored_config(directory)
    quantization = config.quantization_config
    with damage_named(directory / "config.json", "makes no model"):
        skeleton, parameters = _skeleton(config, quantization)
    on_disk = names_on_disk(skeleton) or {}
    stored = StoredTensors(directory)
    _check_tensors(skeleton, on_disk, stored, directory)
    report = skeleton.quantization_report
    assert isinstance(report, ConversionReport)
    return StoredModel(
        source=source,
        architecture=(config.architectures or [type(skeleton).__name__])[0],
        quantization=quantization,
        files=stored.sizes,
        layers=tuple(_stored_layer(plan, on_disk, stored) for plan in report.layers),
        plans=tuple(report.layers),
        has_processor=has_processor(directory),
        parameters=parameters,
        labels=tuple(name for _, name in sorted((config.id2label or {}).items())),
    )


def _skeleton(config: PreTrainedConfig, quantization: SAQQuantizationConfig) -> tuple[nn.Module, int]:
    """Build the quantized model on the meta device, where it takes no memory; also count its float parameters."""
    kind = model_class(config)
    with torch.device("meta"):
        # Build a float model: for a `quantization_config` transformers would look for a quantizer.
        plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
        model = kind.from_config(plain) if hasattr(kind, "from_config") else kind(plain)
        parameters = float_parameters(model)
        if quantization.storage == "packed":
            convert_to_packed(model, quantization)
        else:
            convert(model, quantization, stored=True)
    return model, parameters


def _check_tensors(skeleton: nn.Module, on_disk: dict[str, str], stored: StoredTensors, directory: Path) -> None:
    """Raise `ValueError` if a tensor of a quantized layer is absent, or has another shape or type than it must."""
    tensors = skeleton.state_dict(keep_vars=True)
    count = Counter(id(tensor) for tensor in tensors.values())
    for layer, module in skeleton.named_modules():
        if not isinstance(module, (QuantizedLayer, PackedLayer)):
            continue
        for name in (f"{layer}.{own}" for own in module.state_dict()):
            expected, disk = tensors[name], on_disk.get(name, name)
            if disk not in stored.names:
                if not on_disk or count[id(expected)] > 1:  # kept in another form, or under the name it is tied to
                    continue
                found = "is in no weight file"
            else:
                shape, dtype = stored.kind_of(disk)
                if shape == expected.shape and dtype.is_floating_point == expected.is_floating_point():
                    continue
                found = f"has shape {tuple(shape)} and type {dtype}"
            raise ValueError(
                f"{directory}: {disk} {found}; expected shape {tuple(expected.shape)} and a type like "
                f"{expected.dtype}, as config.json says. The files are damaged, or not of one model; get them again."
            )


def _stored_layer(plan: LayerPlan, on_disk: dict[str, str], stored: StoredTensors) -> StoredLayer:
    def name(suffix: str) -> str:
        return on_disk.get(f"{plan.name}.{suffix}", f"{plan.name}.{suffix}")

    scales = None
    for suffix in ("weight_scale", "weight_quantizer.scale"):  # in float storage only LSQ stores a scale
        scales = stored.tensor(name(suffix)) if scales is None else scales
    packed = stored.bytes_of(name("packed_weight"))
    return StoredLayer(
        name=plan.name,
        layer_type=plan.layer_type,
        weight_bits=plan.settings.get("weight_bits"),
        activation_bits=plan.settings.get("activation_bits"),
        quantizer=plan.settings.get("quantizer"),
        note=plan.reason,
        weight_bytes=stored.bytes_of(name("weight")) if packed is None else packed,
        scales=None if scales is None else scales.numel(),
        scale_min=None if scales is None else scales.min().item(),
        scale_max=None if scales is None else scales.max().item(),
    )

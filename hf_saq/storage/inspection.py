"""What a saved quantized model is, read from its `config.json` and its weight files without loading the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from ..config import QUANT_METHOD, SAQQuantizationConfig
from ..conversion.forms import convert_to_packed
from ..conversion.report import ConversionReport, LayerPlan
from ..conversion.swapping import convert
from ..hub.card import CardFacts, has_processor, kibibytes

NEEDED_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*processor_config.json")


@dataclass(frozen=True)
class StoredLayer:
    """One layer that can be quantized; bits and scales are `None` where it is in float or has none.

    Attributes:
        weight_bytes: Of its weight in the file: the codes if it is packed.
        scales: How many scales its weight has; `scale_min` and `scale_max` are the smallest and the largest.
    """

    name: str
    layer_type: str
    weight_bits: int | None
    activation_bits: int | None
    quantizer: str | None
    note: str
    weight_bytes: int | None
    scales: int | None
    scale_min: float | None
    scale_max: float | None


@dataclass(frozen=True)
class StoredModel:
    """What [`inspect_checkpoint`] finds; `print` shows a table, `to_dict` is JSON-plain.

    Attributes:
        source: Directory or repository.
        quantization: The `quantization_config`.
        files: Weight files and their bytes.
    """

    source: str
    architecture: str
    quantization: SAQQuantizationConfig
    files: dict[str, int]
    layers: tuple[StoredLayer, ...]
    plans: tuple[LayerPlan, ...]
    has_processor: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "architecture": self.architecture,
            "quantization_config": self.quantization.to_dict(),
            "files": self.files,
            "weight_bytes": sum(self.files.values()),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def card_facts(self, load_from: str) -> CardFacts:
        """What a card can say about it: nothing of how it was trained or how good it is."""
        return CardFacts(
            name=load_from.split("/")[-1],
            load_from=load_from,
            architecture=self.architecture,
            config=self.quantization,
            layers=self.plans,
            has_processor=self.has_processor,
            weight_bytes=sum(self.files.values()),
        )

    def __str__(self) -> str:
        config = self.quantization
        lines = [
            f"{self.source}: {self.architecture}",
            f"storage {config.storage}, format version {config.format_version}, quantizer {config.quantizer}",
            *(f"{name}: {kibibytes(size)}" for name, size in self.files.items()),
        ]
        rows = [("module", "type", "W", "A", "weight bytes", "scales", "smallest", "largest", "note")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    layer.layer_type,
                    str(layer.weight_bits or "float"),
                    str(layer.activation_bits or "float"),
                    "-" if layer.weight_bytes is None else f"{layer.weight_bytes:,}",
                    "-" if layer.scales is None else str(layer.scales),
                    "-" if layer.scale_min is None else f"{layer.scale_min:.3g}",
                    "-" if layer.scale_max is None else f"{layer.scale_max:.3g}",
                    layer.note,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            [*lines, *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)]
        )


def local_directory(source: str, revision: str | None = None) -> Path:
    """The directory `source`, or where the files of a repository of that name were downloaded to.

    Raises:
        ValueError: If it is neither.
        OSError: If the Hub refuses or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"{source} is a file; expected the directory of a saved model or a repository on the Hub.")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(NEEDED_FILES)))
    except OSError as error:
        raise OSError(f"{source} is not a directory here and could not be had from the Hub: {error}") from error


def stored_config(directory: Path) -> PreTrainedConfig:
    """The `config.json` of a quantized model, its `quantization_config` checked.

    Raises:
        ValueError: If it is missing or not one of ours.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json; expected the directory of a saved model.")
    config = AutoConfig.from_pretrained(directory)
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method")
    if method != QUANT_METHOD:
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config.quant_method is {method!r}; expected {QUANT_METHOD!r}, "
            "as in what hf_saq saves."
        )
    config.quantization_config = SAQQuantizationConfig.from_dict(found)
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a stored model was saved from, or the automatic one."""
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, AutoModelForImageClassification)


def inspect_checkpoint(source: str, revision: str | None = None) -> StoredModel:
    """Read what is stored: configuration, sizes, and the scales of each layer; nothing else of the weights is read.

    Args:
        source: Directory of a saved model, packed or in float storage, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.

    Raises:
        ValueError: If it is not a model that hf_saq saved, or a weight file cannot be read.
    """
    directory = local_directory(source, revision)
    config = stored_config(directory)
    quantization = config.quantization_config
    skeleton = _skeleton(config, quantization)
    on_disk = _names_on_disk(skeleton)
    stored = _WeightFiles(directory)
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
    )


def _skeleton(config: PreTrainedConfig, quantization: SAQQuantizationConfig) -> nn.Module:
    """The quantized model without memory."""
    kind = model_class(config)
    with torch.device("meta"):
        # A float model: transformers would look for the quantizer of a configuration that has one.
        plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
        model = kind.from_config(plain) if hasattr(kind, "from_config") else kind(plain)
        (convert_to_packed if quantization.storage == "packed" else convert)(model, quantization)
    return model


def _names_on_disk(model: nn.Module) -> dict[str, str]:
    """Name of a tensor in the model -> in the file; transformers saves some architectures under older names."""
    state = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in state.items()}
    renamed = revert_weight_conversion(model, dict(state))  # type: ignore[arg-type]
    return {names[id(tensor)]: name for name, tensor in renamed.items() if id(tensor) in names}


class _WeightFiles:
    """The weight files of a directory: their sizes, and their tensors by name.

    Raises:
        ValueError: If there are none or one of them cannot be read.
    """

    def __init__(self, directory: Path):
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{directory} has no weight file (*.safetensors).")
        self.sizes = {file.name: file.stat().st_size for file in files}
        self.where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self.where |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise ValueError(
                    f"{file} cannot be read ({error}). It is cut off or damaged; get it again."
                ) from error

    def tensor(self, name: str) -> Tensor | None:
        if name not in self.where:
            return None
        with safe_open(self.where[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def bytes_of(self, name: str) -> int | None:
        if name not in self.where:
            return None
        with safe_open(self.where[name], framework="pt") as opened:
            part = opened.get_slice(name)
            return torch.Size(part.get_shape()).numel() * _ITEM_BYTES.get(part.get_dtype(), 4)


_ITEM_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""By the type names of safetensors."""


def _stored_layer(plan: LayerPlan, on_disk: dict[str, str], stored: _WeightFiles) -> StoredLayer:
    def name(suffix: str) -> str:
        return on_disk.get(f"{plan.name}.{suffix}", f"{plan.name}.{suffix}")

    scales = None
    for suffix in ("weight_scale", "weight_quantizer.scale"):  # in float storage only LSQ has one
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

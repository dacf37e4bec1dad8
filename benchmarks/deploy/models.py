"""The models whose forms are measured: real weights where they lie in `../shared/data`, random ones otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_saq import SAQQuantizationConfig, calibrate, quantize

from ..shared.places import EFFICIENTNET, MOBILENET, VIT_TINY

IMAGE_SIZE = 224
LABELS = 1000


@dataclass(frozen=True)
class DeployModel:
    """How to build a model, and its bits.

    Attributes:
        weights: Directory of real weights, or `""`.
        build: Makes it with random weights.
        weight_bits, activation_bits: Of all layers but the first and the last, which have 8.
        fields: More fields of the quantization.
        target: What it is exported for.
    """

    weights: str
    build: Callable[[], Any]
    weight_bits: int
    activation_bits: int
    fields: dict[str, Any]
    target: str = "cpu"


def _mobilenet() -> Any:
    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=LABELS))  # type: ignore[call-arg]


def _vit(width: int) -> Any:
    config: dict[str, Any] = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    config["num_labels"] = LABELS
    return ViTForImageClassification(ViTConfig(**config))


def _resnet18() -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    sizes["num_labels"] = LABELS
    return ResNetForImageClassification(ResNetConfig(**sizes))


def _efficientnet() -> Any:
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=LABELS)  # type: ignore[call-arg]
    return TimmWrapperForImageClassification(config)


PRODUCTS = {"quantize_attention": True}
CHANNEL = {"weight_granularity": "channel"}
MODELS = {
    "vit-tiny": DeployModel(VIT_TINY, lambda: _vit(192), 4, 4, PRODUCTS),
    "vit-tiny-float-products": DeployModel(VIT_TINY, lambda: _vit(192), 4, 4, {}),
    "vit-small": DeployModel("", lambda: _vit(384), 4, 4, PRODUCTS),
    "resnet18": DeployModel("", _resnet18, 4, 4, CHANNEL),
    "mobilenet-v2": DeployModel(MOBILENET, _mobilenet, 8, 8, CHANNEL),
    "mobilenet-v2-vnni": DeployModel(MOBILENET, _mobilenet, 8, 8, CHANNEL, target="cpu-vnni"),
    "efficientnet-lite0": DeployModel(EFFICIENTNET, _efficientnet, 8, 8, CHANNEL),
}
"""Of the transformers, `float-products` has the products of attention in float, as the library does by default. With
8-bit weights and inputs, `vnni` has no layers in two halves, which CPUs without VNNI need: what the halves cost."""


def save_quantized(name: str, directory: Path) -> bool:
    """Quantize and calibrate a model on noise and save it. Returns whether its weights are real."""
    torch.manual_seed(0)
    chosen = MODELS[name]
    is_real = bool(chosen.weights) and Path(chosen.weights).is_dir()
    model = AutoModelForImageClassification.from_pretrained(chosen.weights) if is_real else chosen.build()
    config = SAQQuantizationConfig(
        weight_bits=chosen.weight_bits,
        activation_bits=chosen.activation_bits,
        scale_init="mean",
        **chosen.fields,
    )
    quantized = calibrate(quantize(model.eval(), config), [torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)])
    quantized.eval().save_pretrained(directory)  # type: ignore[operator]
    return is_real

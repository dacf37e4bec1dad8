"""Models of full size, quantized copies of them, and a plain training step of either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize

BITS = 4


def vit_small() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**size, num_hidden_layers=12, num_labels=1000))  # type: ignore[call-arg]


def resnet18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    size: dict[str, Any] = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    return ResNetForImageClassification(ResNetConfig(**size, num_labels=1000))  # type: ignore[call-arg]


def of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformers ViT-S/16": vit_small,
    "transformers ResNet-18": resnet18,
    "timm vit_small_patch16_224": partial(of_timm, "vit_small_patch16_224"),
    "timm resnet18": partial(of_timm, "resnet18"),
}


def quantized(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    was_layer = isinstance(model, (nn.Linear, nn.Conv2d))
    config = SAQQuantizationConfig(weight_bits=BITS, activation_bits=BITS, first_last_bits=None, **options)
    model = quantize(nn.Sequential(copy.deepcopy(model)) if was_layer else copy.deepcopy(model), config)
    calibrate(model, [x])
    return model.train()


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        output = model(x)
        loss = nn.functional.cross_entropy(output if isinstance(output, Tensor) else output.logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

"""Models that have learned something: small ones, trained on scikit-learn's digits."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits
from tiny_models import VIT_SIZES, seeded
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


@torch.enable_grad()
def digit_classifier(family: Literal["vit", "resnet"]) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A float model trained for a second or two on scikit-learn's digits, with images and labels it has not seen."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    with seeded(0):
        model: PreTrainedModel
        if family == "vit":
            sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 8, "patch_size": 2}
            others = {"num_channels": 1, "num_labels": 10, "initializer_range": 0.1}
            model = ViTForImageClassification(ViTConfig(**{**VIT_SIZES, **sizes, **others}))
        else:
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
            model = ResNetForImageClassification(
                ResNetConfig(**sizes, num_channels=1, num_labels=10, layer_type="basic")  # type: ignore[arg-type]
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        model.train()
        for _ in range(6):
            for batch in torch.randperm(1200).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]).logits, y[batch]).backward()
                optimizer.step()
    return model.eval(), x[1200:], y[1200:]

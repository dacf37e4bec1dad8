"""Task: a small ViT, trained on CIFAR-10 in float here, quantized with few images per class at hand."""

from __future__ import annotations

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from ...shared.images import Images
from ...shared.training_loop import fit
from ..task import Data, Paths, Task
from . import cifar_resnet

FLOAT_STEPS, FLOAT_BATCH, FLOAT_LEARNING_RATE = 3000, 64, 1e-3
WEIGHT_DECAY = 0.05


def build() -> nn.Module:
    """16 patches of 8 x 8 pixels, 4 blocks of width 128 with 4 heads; no dropout."""
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            initializer_range=0.08,  # the usual 0.02 is made for hundreds of dimensions
            num_labels=10,
        )  # type: ignore[call-arg]
    )


def train_float(paths: Paths, data: Data, images: Images, seed: int) -> nn.Module:  # noqa: ARG001
    model = build()
    optimizer = TASK.optimizer_of(model, FLOAT_LEARNING_RATE)
    fit(model, data.training_batches(data.training, FLOAT_BATCH, seed), FLOAT_STEPS, optimizer)
    return model


TASK = Task(
    title="CIFAR-10 (JPEG copy), small ViT",
    description="The same images and augmentation, and a ViT of transformers: 4 blocks of width 128 on 16 patches, "
    f"trained in float from nothing on all training images: {FLOAT_STEPS} steps of {FLOAT_BATCH}, learning rate "
    f"{FLOAT_LEARNING_RATE:g}.",
    load=cifar_resnet.load,
    build=build,
    train_float=train_float,
    float_per_seed=False,
    bits=(4, 2),
    images_per_class=50,
    steps=160,
    batch_size=32,
    optimizer="adamw",
    weight_decay=WEIGHT_DECAY,
    learning_rates=(3e-4, 1e-3, 3e-3),
    test_images=5000,
    shared_radius=True,
    needs=("cifar",),
    tuned_at=2,
)

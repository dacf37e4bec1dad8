"""Task: MobileNetV2 with ImageNet weights on Oxford Flowers-102, official split, small images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from examples.image_model import refit_batch_norm

from ...shared import images
from ...shared.images import Images, center_crop, crop_and_mirror
from ...shared.training_loop import fit
from ..sources.photographs import load_photographs
from ..task import Data, Paths, Task

SIZE, STORED_SIZE, CLASSES = 64, 73, 102
CHANGES: dict[str, Any] = {"num_labels": CLASSES, "classifier_dropout_prob": 0.2}
BATCH_NORM_MOMENTUM = 0.1
MEAN = STD = (0.5, 0.5, 0.5)
"""What the checkpoint was trained with."""
FLOAT_STEPS, FLOAT_BATCH, FLOAT_LEARNING_RATE = 320, 32, 1e-3
SEED = 0


def load(paths: Paths) -> Data:
    return load_at(paths, SIZE, STORED_SIZE, MEAN, STD)


def load_at(paths: Paths, size: int, stored_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Data:
    """The official split, `size x size` pixels cut out of `stored_size`, mirrored and normalized."""
    stored = paths.cache / f"flowers-{stored_size}.safetensors"
    training, validation, test = load_photographs(paths.flowers, ("train", "validation", "test"), stored_size, stored)
    return Data(
        training,
        validation,
        images.draw(test, len(test), SEED),  # the files have them in an order of their own
        lambda pixels, generator: images.normalize(crop_and_mirror(pixels, size, generator), mean, std),
        lambda pixels: images.normalize(center_crop(pixels, size), mean, std),
    )


def build() -> nn.Module:
    """MobileNetV2 1.0 with random weights, as the checkpoint has it but for the head."""
    return prepared(MobileNetV2ForImageClassification(MobileNetV2Config(**CHANGES)))


def prepared(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = BATCH_NORM_MOMENTUM  # the 0.997 of the checkpoint keeps only the last batch
    return model


def train_float(paths: Paths, data: Data, drawn: Images, seed: int) -> nn.Module:  # noqa: ARG001
    torch.manual_seed(SEED)  # of the new head, and of dropout
    model = prepared(
        MobileNetV2ForImageClassification.from_pretrained(paths.mobilenet, ignore_mismatched_sizes=True, **CHANGES)
    )
    batches = data.training_batches(data.training, FLOAT_BATCH, SEED)
    refit_batch_norm(model, (next(batches)["pixels"] for _ in range(8)))  # those of the checkpoint were folded
    fit(model, batches, FLOAT_STEPS, TASK.optimizer_of(model, FLOAT_LEARNING_RATE))
    return model


TASK = Task(
    title="Flowers-102, MobileNetV2",
    description=f"Oxford Flowers-102, official split (10 images of each class to train on, 10 to choose by), "
    f"{SIZE} x {SIZE} pixels cut out of {STORED_SIZE} and mirrored, and transformers' MobileNetV2 with ImageNet "
    f"weights, fine-tuned in float in {FLOAT_STEPS} steps of {FLOAT_BATCH}, AdamW, learning rate "
    f"{FLOAT_LEARNING_RATE:g}. Weights have one scale per output channel: the depthwise ones of this checkpoint "
    "differ too much for one per tensor.",
    load=load,
    build=build,
    train_float=train_float,
    float_per_seed=False,
    bits=(4, 3),
    images_per_class=None,
    steps=384,
    batch_size=32,
    optimizer="adamw",
    weight_decay=0.01,
    learning_rates=(5e-4, 1e-3, 2e-3),
    radii=(0.03, 0.1, 0.3, 1.0),
    shared_radius=True,
    quantization={"weight_granularity": "channel"},
    test_images=2000,
    channels_last=True,
    needs=("flowers", "mobilenet"),
    tuned_at=4,
    reported=True,
)

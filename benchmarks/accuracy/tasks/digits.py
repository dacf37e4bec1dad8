"""Task: a tiny ViT on few of scikit-learn's digits, trained from nothing for each seed."""

from __future__ import annotations

from torch import nn

from ...shared.digits_training import BATCH_SIZE, WEIGHT_DECAY, load_split, tiny_vit, train
from ...shared.images import Images
from ..task import Data, Paths, Task

POOL, VALIDATION = 1000, 300
FLOAT_EPOCHS, FLOAT_LEARNING_RATE = 30, 3e-3


def load(paths: Paths) -> Data:  # noqa: ARG001 (scikit-learn ships the images)
    training, validation, test = load_split(POOL, VALIDATION)
    return Data(training, validation, test, lambda pixels, generator: pixels, lambda pixels: pixels)  # noqa: ARG005


def train_float(paths: Paths, data: Data, images: Images, seed: int) -> nn.Module:  # noqa: ARG001
    model = tiny_vit(seed)
    train(model, images, FLOAT_EPOCHS, FLOAT_LEARNING_RATE, seed)
    return model


TASK = Task(
    title="digits, tiny ViT",
    description=f"scikit-learn's 1,797 digits of 8 x 8 pixels ({POOL} to draw training images from, {VALIDATION} to "
    "choose by, the rest to test on) and a ViT of one block of width 64 on four patches, no augmentation. Each seed "
    f"draws its images and trains a float model on them from nothing, {FLOAT_EPOCHS} epochs at learning rate "
    f"{FLOAT_LEARNING_RATE:g}.",
    load=load,
    build=lambda: tiny_vit(0),
    train_float=train_float,
    float_per_seed=True,
    bits=(4, 3, 2),
    images_per_class=15,
    steps=200,
    batch_size=BATCH_SIZE,
    optimizer="adamw",
    weight_decay=WEIGHT_DECAY,
    learning_rates=(2e-3, 4e-3, 8e-3),
    trial_seeds=(100, 101, 102),
)

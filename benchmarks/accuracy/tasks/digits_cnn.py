"""Task: a small CNN with batch norms on few of scikit-learn's digits, trained from nothing for each seed."""

from __future__ import annotations

from torch import nn

from ...shared.digits_training import BATCH_SIZE, WEIGHT_DECAY, small_cnn, train
from ...shared.images import Images
from ..task import Data, Paths, Task
from . import digits

FLOAT_EPOCHS, FLOAT_LEARNING_RATE = 30, 3e-3


def train_float(paths: Paths, data: Data, images: Images, seed: int) -> nn.Module:  # noqa: ARG001
    model = small_cnn(seed)
    train(model, images, FLOAT_EPOCHS, FLOAT_LEARNING_RATE, seed)
    return model


TASK = Task(
    title="digits, small CNN",
    description="The same digits, and four 3 x 3 convolutions of 8 to 32 channels with batch norms. Each seed draws "
    f"its images and trains a float model on them from nothing, {FLOAT_EPOCHS} epochs at learning rate "
    f"{FLOAT_LEARNING_RATE:g}. Weights have one scale per output channel.",
    load=digits.load,
    build=lambda: small_cnn(0),
    train_float=train_float,
    float_per_seed=True,
    bits=(3,),
    images_per_class=12,
    steps=160,
    batch_size=BATCH_SIZE,
    optimizer="adamw",
    weight_decay=WEIGHT_DECAY,
    learning_rates=(4e-3, 8e-3, 1.2e-2),
    radii=(0.1, 0.25, 0.5, 1.0),
    adaptive_radii=(0.5, 1.0, 2.0, 4.0),
    quantization={"weight_granularity": "channel"},
    trial_seeds=(100, 101),
)

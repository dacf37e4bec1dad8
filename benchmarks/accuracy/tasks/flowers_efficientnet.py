"""Task: EfficientNet-Lite0 with ImageNet weights on Flowers-102, half the usual side, with what MobileNetV2 chose."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from ...shared.images import Images
from ...shared.training_loop import fit
from ..task import Data, Paths, Task
from . import flowers

SIZE, STORED_SIZE = 112, 128
ARCHITECTURE = "tf_efficientnet_lite0"
CHANGES: dict[str, Any] = {"num_labels": flowers.CLASSES, "model_args": {"drop_rate": 0.2}}
BATCH_NORM_MOMENTUM = 0.1
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""What the checkpoint was trained with: `(x - 127) / 128`."""
FLOAT_STEPS, FLOAT_BATCH, FLOAT_WARMUP, FLOAT_LEARNING_RATE = 384, 34, 20, 1e-3
SEED = 0


def build() -> nn.Module:
    """EfficientNet-Lite0 with random weights, as the checkpoint has it but for the head and its dropout."""
    return prepared(TimmWrapperForImageClassification(TimmWrapperConfig(architecture=ARCHITECTURE, **CHANGES)))


def pretrained(directory: Path) -> nn.Module:
    """The model of [`build`] with the weights in `directory` and a new head."""
    return prepared(
        TimmWrapperForImageClassification.from_pretrained(directory, ignore_mismatched_sizes=True, **CHANGES)
    )


def prepared(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = BATCH_NORM_MOMENTUM  # the 0.01 of the checkpoint lags behind in some hundred steps
    return model


def train_float(paths: Paths, data: Data, drawn: Images, seed: int) -> nn.Module:  # noqa: ARG001
    torch.manual_seed(SEED)  # of the new head, and of dropout
    model = pretrained(paths.efficientnet)
    batches = data.training_batches(data.training, FLOAT_BATCH, SEED)
    fit(model, batches, FLOAT_STEPS, TASK.optimizer_of(model, FLOAT_LEARNING_RATE), warmup=FLOAT_WARMUP)
    return model


TASK = Task(
    title="Flowers-102, EfficientNet-Lite0",
    description=f"Oxford Flowers-102, official split, {SIZE} x {SIZE} pixels cut out of {STORED_SIZE} and mirrored, "
    f"and timm's EfficientNet-Lite0 with ImageNet weights, fine-tuned in float in {FLOAT_STEPS} steps of "
    f"{FLOAT_BATCH}, AdamW, learning rate {FLOAT_LEARNING_RATE:g} after {FLOAT_WARMUP} steps of warm-up. Weights have "
    "one scale per output channel. Learning rates, radius, steps and batch are those of MobileNetV2 on the same "
    "images; nothing was chosen here.",
    load=partial(flowers.load_at, size=SIZE, stored_size=STORED_SIZE, mean=MEAN, std=STD),
    build=build,
    train_float=train_float,
    float_per_seed=False,
    bits=(4,),
    images_per_class=None,
    steps=flowers.TASK.steps,
    batch_size=flowers.TASK.batch_size,
    optimizer=flowers.TASK.optimizer,
    weight_decay=flowers.TASK.weight_decay,
    # What plain QAT and SAQ chose there.
    learning_rates=(1e-3,),
    plain_learning_rates=(1e-3,),
    radii=(0.1,),
    adaptive_radii=(0.1,),
    quantization={"weight_granularity": "channel"},
    test_images=2000,
    channels_last=True,
    needs=("flowers", "efficientnet"),
    reported=True,
)

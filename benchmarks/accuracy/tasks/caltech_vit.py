"""Task: ViT-tiny with ImageNet weights on Caltech-101, half the usual side."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...shared import images
from ...shared.images import Images, center_crop, crop_and_mirror, split_per_class
from ...shared.training_loop import fit
from ..sources import vit_tiny
from ..sources.photographs import load_photographs
from ..task import Data, Paths, Task

SIZE, STORED_SIZE, CLASSES = 112, 128, 101
VALIDATION = 0.2
FLOAT_STEPS, FLOAT_BATCH, FLOAT_WARMUP, FLOAT_LEARNING_RATE = 400, 48, 20, 2e-4
SEED = 0


def load(paths: Paths) -> Data:
    stored = paths.cache / f"caltech-{STORED_SIZE}.safetensors"
    known, test = load_photographs(paths.caltech, ("train", "test"), STORED_SIZE, stored)
    validation, training = split_per_class(known, VALIDATION, SEED)
    return Data(
        # The file has them class by class: mixed, so that the first are as good as any to calibrate on.
        images.draw(training, len(training), SEED),
        validation,
        images.draw(test, len(test), SEED),
        lambda pixels, generator: normalize(crop_and_mirror(pixels, SIZE, generator)),
        lambda pixels: normalize(center_crop(pixels, SIZE)),
    )


def normalize(pixels: Tensor) -> Tensor:
    return images.normalize(pixels, vit_tiny.MEAN, vit_tiny.STD)


def train_float(paths: Paths, data: Data, drawn: Images, seed: int) -> nn.Module:  # noqa: ARG001
    torch.manual_seed(SEED)  # of the new head
    model = vit_tiny.pretrained(paths.vit_tiny, CLASSES, SIZE)
    batches = data.training_batches(data.training, FLOAT_BATCH, SEED)
    fit(model, batches, FLOAT_STEPS, TASK.optimizer_of(model, FLOAT_LEARNING_RATE), warmup=FLOAT_WARMUP)
    return model


TASK = Task(
    title="Caltech-101, ViT-tiny",
    description="Caltech-101 without the background class, up to 30 images of each class to train on, a fifth of "
    f"which is set aside to choose by, {SIZE} x {SIZE} pixels cut out of {STORED_SIZE} and mirrored, and "
    "transformers' ViT-tiny with ImageNet weights, its position embeddings interpolated once to 49 patches, "
    f"fine-tuned in float in {FLOAT_STEPS} steps of {FLOAT_BATCH}, AdamW, learning rate {FLOAT_LEARNING_RATE:g} after "
    f"{FLOAT_WARMUP} steps of warm-up.",
    load=load,
    build=partial(vit_tiny.build, CLASSES, SIZE),
    train_float=train_float,
    steps=500,
    batch_size=48,
    needs=("caltech", "vit_tiny"),
    **vit_tiny.TRAINING,
    reported=True,
)

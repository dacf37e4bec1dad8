"""Task: ViT-tiny with ImageNet weights on Oxford Flowers-102, official split, half the usual side."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ...shared.images import Images
from ...shared.training_loop import fit
from ..sources import vit_tiny
from ..task import Data, Paths, Task
from . import flowers

SIZE, STORED_SIZE = 112, 128
FLOAT_STEPS, FLOAT_BATCH, FLOAT_WARMUP, FLOAT_LEARNING_RATE = 360, 34, 20, 2e-4
SEED = 0


def train_float(paths: Paths, data: Data, drawn: Images, seed: int, size: int = SIZE) -> nn.Module:  # noqa: ARG001
    torch.manual_seed(SEED)  # of the new head
    model = vit_tiny.pretrained(paths.vit_tiny, flowers.CLASSES, size)
    batches = data.training_batches(data.training, FLOAT_BATCH, SEED)
    fit(model, batches, FLOAT_STEPS, TASK.optimizer_of(model, FLOAT_LEARNING_RATE), warmup=FLOAT_WARMUP)
    return model


TASK = Task(
    title="Flowers-102, ViT-tiny",
    description=f"Oxford Flowers-102, official split, {SIZE} x {SIZE} pixels cut out of {STORED_SIZE} and mirrored, "
    "and transformers' ViT-tiny with ImageNet weights, its position embeddings interpolated once to 49 patches, "
    f"fine-tuned in float in {FLOAT_STEPS} steps of {FLOAT_BATCH}, AdamW, learning rate {FLOAT_LEARNING_RATE:g} after "
    f"{FLOAT_WARMUP} steps of warm-up.",
    load=partial(flowers.load_at, size=SIZE, stored_size=STORED_SIZE, mean=vit_tiny.MEAN, std=vit_tiny.STD),
    build=partial(vit_tiny.build, flowers.CLASSES, SIZE),
    train_float=train_float,
    steps=240,  # 480 at their best learning rate are no better: benchmarks/results/convergence
    batch_size=32,  # an eighth of it is four images
    test_images=2000,
    needs=("flowers", "vit_tiny"),
    **vit_tiny.TRAINING,
    reported=True,
)

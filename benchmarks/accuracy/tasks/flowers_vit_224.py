"""Task: ViT-tiny with ImageNet weights on Oxford Flowers-102 at the size that it was trained on, for a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..sources import vit_tiny
from . import flowers, flowers_vit

SIZE, STORED_SIZE = 224, 256

TASK = replace(
    flowers_vit.TASK,
    title="Flowers-102 at 224 px, ViT-tiny",
    description=f"Oxford Flowers-102, {SIZE} x {SIZE} pixels cut out of {STORED_SIZE} and mirrored, and transformers' "
    f"ViT-tiny with ImageNet weights, fine-tuned in float as at {flowers_vit.SIZE} pixels, where the learning rates "
    "and radii of all methods were chosen too.",
    load=partial(flowers.load_at, size=SIZE, stored_size=STORED_SIZE, mean=vit_tiny.MEAN, std=vit_tiny.STD),
    build=partial(vit_tiny.build, flowers.CLASSES, SIZE),
    train_float=partial(flowers_vit.train_float, size=SIZE),
    decoded=f"flowers-{STORED_SIZE}.safetensors",
    tuned_as="flowers-vit",
)

"""Task: ViT-tiny on ten images of each class of Caltech-101, with what Flowers-102 chose."""

from __future__ import annotations

from dataclasses import replace

from ...shared.images import draw_per_class
from ..task import Data, Paths
from . import caltech_vit, flowers_vit_pooled

IMAGES_PER_CLASS = 10


def load(paths: Paths) -> Data:
    data = caltech_vit.load(paths)
    return replace(data, training=draw_per_class(data.training, IMAGES_PER_CLASS, caltech_vit.SEED))


TASK = replace(
    caltech_vit.TASK,
    title=f"Caltech-101, ViT-tiny, {IMAGES_PER_CLASS} images a class",
    description=f"{caltech_vit.TASK.description} All training is on {IMAGES_PER_CLASS} images of each class, in "
    "float32. Learning rates and the one radius are those of Flowers-102 with one radius; nothing was chosen here.",
    load=load,
    steps=flowers_vit_pooled.TASK.steps,
    batch_size=flowers_vit_pooled.TASK.batch_size,
    bits=flowers_vit_pooled.TASK.bits,
    learning_rates=flowers_vit_pooled.TASK.learning_rates,
    plain_learning_rates=flowers_vit_pooled.TASK.plain_learning_rates,
    radii=flowers_vit_pooled.TASK.radii,
    adaptive_radii=flowers_vit_pooled.TASK.adaptive_radii,
    precision=flowers_vit_pooled.TASK.precision,
)

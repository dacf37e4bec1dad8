"""The tasks of the accuracy benchmark, by name."""

from __future__ import annotations

from ..task import Task
from . import (
    caltech_vit,
    caltech_vit_few,
    cifar_resnet,
    cifar_vit,
    digits,
    digits_cnn,
    flowers,
    flowers_efficientnet,
    flowers_vit,
    flowers_vit_224,
    flowers_vit_480,
    flowers_vit_pooled,
)

TASKS: dict[str, Task] = {
    "digits": digits.TASK,
    "digits-cnn": digits_cnn.TASK,
    "flowers": flowers.TASK,
    "cifar-resnet": cifar_resnet.TASK,
    "cifar-vit": cifar_vit.TASK,
    "flowers-vit": flowers_vit.TASK,
    "flowers-vit-480": flowers_vit_480.TASK,
    "flowers-vit-pooled": flowers_vit_pooled.TASK,
    "caltech-vit": caltech_vit.TASK,
    "caltech-vit-few": caltech_vit_few.TASK,
    "flowers-efficientnet": flowers_efficientnet.TASK,
    "flowers-vit-224": flowers_vit_224.TASK,
}
USUAL = [name for name, task in TASKS.items() if task.tuned_as is None]
"""Tasks of a sweep unless others are asked for. The rest wants a GPU and settings that another task has chosen."""

"""The tasks of the accuracy benchmark, by name."""

from __future__ import annotations

from ..task import Task
from . import caltech_vit, cifar_resnet, cifar_vit, digits, digits_cnn, flowers, flowers_efficientnet, flowers_vit

TASKS: dict[str, Task] = {
    "digits": digits.TASK,
    "digits-cnn": digits_cnn.TASK,
    "flowers": flowers.TASK,
    "cifar-resnet": cifar_resnet.TASK,
    "cifar-vit": cifar_vit.TASK,
    "flowers-vit": flowers_vit.TASK,
    "caltech-vit": caltech_vit.TASK,
    "flowers-efficientnet": flowers_efficientnet.TASK,
}

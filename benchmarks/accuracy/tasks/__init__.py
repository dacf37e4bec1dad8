"""The tasks of the accuracy benchmark, by name."""

from __future__ import annotations

from ..task import Task
from . import cifar_resnet, cifar_vit, digits, flowers

TASKS: dict[str, Task] = {
    "digits": digits.TASK,
    "flowers": flowers.TASK,
    "cifar-resnet": cifar_resnet.TASK,
    "cifar-vit": cifar_vit.TASK,
}

"""The tasks of the accuracy benchmark, by name."""

from __future__ import annotations

import task_cifar_resnet
import task_cifar_vit
import task_digits
import task_flowers
from accuracy_task import Task

TASKS: dict[str, Task] = {
    "digits": task_digits.TASK,
    "flowers": task_flowers.TASK,
    "cifar-resnet": task_cifar_resnet.TASK,
    "cifar-vit": task_cifar_vit.TASK,
}

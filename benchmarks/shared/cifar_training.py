"""The plain training that the benchmarks on CIFAR-10 share: SGD with momentum, cosine to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import training_loop
from .cifar_data import evaluation_batches, training_batches
from .images import Images
from .training_loop import sgd, take_steps

CALIBRATION_BATCHES, CALIBRATION_BATCH = 2, 128
LOSS_WINDOW = 16
"""Steps at the end of training over which the loss is averaged."""


def train(
    model: nn.Module, images: Images, steps: int, batch_size: int, lr: float, weight_decay: float, seed: int
) -> float:
    """Train `model` in place for `steps` batches of augmented images; quantizers' values in groups of their own.

    Args:
        seed: Of the order of the images and of their augmentation, alike for every model that is trained with it.

    Returns:
        The mean training loss of the last 16 steps.
    """
    batches = training_batches(images, batch_size, torch.Generator().manual_seed(seed))
    losses, _ = take_steps(model, batches, steps, sgd(model, lr, weight_decay))
    last = [loss.item() for loss in losses[-LOSS_WINDOW:]]
    return sum(last) / len(last)


def calibration_batches(images: Images) -> list[Tensor]:
    """The first `images`, normalized and as they are, in batches for `hf_saq.calibrate`."""
    shown = images[slice(0, CALIBRATION_BATCHES * CALIBRATION_BATCH)]
    return [batch["pixels"] for batch in evaluation_batches(shown, CALIBRATION_BATCH)]


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of `images` whose highest logit is that of their class, 0 to 1. Leaves `model` in evaluation mode."""
    return training_loop.accuracy(model, evaluation_batches(images))

"""The plain training step that the benchmarks on CIFAR-10 share: SGD with momentum, cosine to zero."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_saq.training.parameter_groups import parameter_groups

from .cifar_data import Images, evaluation_batches, training_batches

MOMENTUM = 0.9
SCALE_LR_RATIO = 0.1
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
    groups = parameter_groups(model, lr, weight_decay, SCALE_LR_RATIO)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    batches = training_batches(images, batch_size, torch.Generator().manual_seed(seed))
    model.train()
    losses = []
    for pixels, labels in itertools.islice(batches, steps):
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    last = losses[-LOSS_WINDOW:]
    return sum(last) / len(last)


def calibration_batches(images: Images) -> list[Tensor]:
    """The first `images`, normalized and as they are, in batches for `hf_saq.calibrate`."""
    shown = images[slice(0, CALIBRATION_BATCHES * CALIBRATION_BATCH)]
    return [pixels for pixels, _ in evaluation_batches(shown, CALIBRATION_BATCH)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of `images` whose highest logit is that of their class, 0 to 1. Leaves `model` in evaluation mode."""
    model.eval()
    hits = sum((model(pixels).argmax(dim=1) == labels).sum().item() for pixels, labels in evaluation_batches(images))
    return hits / len(images)

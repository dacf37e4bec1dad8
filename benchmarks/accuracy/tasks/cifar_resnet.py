"""Task: ResNet-20 with published CIFAR-10 weights, quantized with few images per class at hand."""

from __future__ import annotations

import torch
from torch import nn

from ...shared.cifar_data import Images, augment, load_cifar, normalize
from ...shared.cifar_resnet import CifarResNet, load_weights
from ...shared.cifar_training import train
from ...shared.images import draw
from ..task import Data, Paths, Task

VALIDATION = 1500
SPLIT_SEED = 0
FLOAT = {"steps": 128, "batch_size": 64, "lr": 0.01, "weight_decay": 1e-4}


def load(paths: Paths) -> Data:
    cifar = load_cifar(paths.cifar, paths.cache / "cifar")
    order = torch.randperm(len(cifar.train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, training = cifar.train[order[:VALIDATION]], cifar.train[order[VALIDATION:]]
    # Test images come class by class in no file we know of, but nothing promises it.
    test = draw(cifar.test, len(cifar.test), SPLIT_SEED)
    return Data(training, validation, test, lambda pixels, g: normalize(augment(pixels, g)), normalize)


def train_float(paths: Paths, data: Data, images: Images, seed: int) -> nn.Module:  # noqa: ARG001
    model = load_weights(CifarResNet(20), paths.resnet20)
    train(model, data.training, **FLOAT, seed=SPLIT_SEED)  # type: ignore[arg-type]
    return model


TASK = Task(
    title="CIFAR-10 (JPEG copy), ResNet-20",
    description="CIFAR-10 in a lossy JPEG copy, which published figures do not compare with, and ResNet-20 with "
    f"published float weights, adapted to that copy in {FLOAT['steps']} steps of {FLOAT['batch_size']} images. "
    "Shift by up to four pixels and mirroring.",
    load=load,
    build=lambda: CifarResNet(20),
    train_float=train_float,
    float_per_seed=False,
    bits=(4, 3, 2),
    images_per_class=50,
    steps=300,
    batch_size=32,
    optimizer="sgd",
    weight_decay=1e-4,
    learning_rates=(1e-3, 3e-3, 1e-2),
    trial_seeds=(100, 101),
    test_images=5000,
    shared_radius=True,
    channels_last=True,
    needs=("cifar", "resnet20"),
    tuned_at=2,
)

"""Models of a few layers, always the same: each builder draws its weights from the seed it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_saq.quantizers import Quantizer

IMAGE_SIZE = 16
NUM_LABELS = 3
VIT_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "num_labels": NUM_LABELS,
    "initializer_range": 0.2,  # with 0.02 so narrow a model hardly depends on its input
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def vit(seed: int = 0) -> PreTrainedModel:
    return _build(ViTForImageClassification, ViTConfig(**VIT_SIZES), seed)


def deit_with_teacher(seed: int = 0) -> PreTrainedModel:
    return _build(DeiTForImageClassificationWithTeacher, DeiTConfig(**VIT_SIZES), seed)


def convnext(seed: int = 0) -> PreTrainedModel:
    config = ConvNextConfig(
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        num_labels=NUM_LABELS,
        layer_scale_init_value=1.0,
        initializer_range=0.2,
    )
    return _build(ConvNextForImageClassification, config, seed)


def resnet(seed: int = 0) -> PreTrainedModel:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=NUM_LABELS
    )
    return _build(ResNetForImageClassification, config, seed)


def mobilenet_v2(seed: int = 0) -> PreTrainedModel:
    config = MobileNetV2Config(
        depth_multiplier=0.1,
        min_depth=4,
        depth_divisible_by=4,
        expand_ratio=2,
        image_size=IMAGE_SIZE,
        num_labels=NUM_LABELS,
        classifier_dropout_prob=0.0,
    )
    return _build(MobileNetV2ForImageClassification, config, seed)


def swin(seed: int = 0) -> PreTrainedModel:
    """Two stages, whose windows are shifted in the second block of the first."""
    config = SwinConfig(
        image_size=IMAGE_SIZE,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=NUM_LABELS,
        initializer_range=0.2,
    )
    return _build(SwinForImageClassification, config, seed)


def timm_efficientnet(seed: int = 0) -> PreTrainedModel:
    """The EfficientNet that timm tests itself with, as a model of transformers."""
    config = TimmWrapperConfig(architecture="test_efficientnet", num_labels=NUM_LABELS)
    return _build(TimmWrapperForImageClassification, config, seed)


TRANSFORMERS_MODELS = {"vit": vit, "convnext": convnext, "resnet": resnet, "mobilenet_v2": mobilenet_v2}
"""One builder for each family the package is tested on, by name."""


def linear_net(seed: int = 0) -> nn.Sequential:
    """`(batch, 6) -> (batch, 3)`."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def conv_net(seed: int = 0) -> nn.Sequential:
    """`(batch, 3, 8, 8) -> (batch, 3)`, with a grouped convolution and batch normalization."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 3),
        )


def images(count: int = 4, size: int = IMAGE_SIZE, seed: int = 0) -> Tensor:
    """`(count, 3, size, size)`, standard normal."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def vectors(count: int = 8, seed: int = 0) -> Tensor:
    """Inputs of [`linear_net`]."""
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def jitter(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every parameter and running statistic away from what an initialization gives, by up to 20 %, in place.

    What a round trip then restores cannot be a regenerated default.
    """
    generator = torch.Generator().manual_seed(seed)
    states = {id(module.range_state) for module in model.modules() if isinstance(module, Quantizer)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and id(tensor) not in states:
            noise = torch.rand(tensor.shape, generator=generator) * 0.2
            tensor.copy_((tensor + 0.02 * noise) * (1 + noise))
    return model


def _build(model_class: type[PreTrainedModel], config, seed: int) -> PreTrainedModel:
    with seeded(seed):
        model = model_class(config)
    # Biases of zero, as an initialization leaves them, hide what a test could see.
    jitter(model, seed=seed + 1)
    return _settle_batch_norms(model).eval()


@torch.no_grad()
def _settle_batch_norms(model: nn.Module) -> nn.Module:
    """Give running statistics the values of one batch, without which activations fade away in a deep model."""
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    if momenta:
        for m in momenta:
            m.momentum = 1.0
        model.train()(images(32, seed=99))
        for m, momentum in momenta.items():
            m.momentum = momentum
            m.num_batches_tracked.zero_()
    return model

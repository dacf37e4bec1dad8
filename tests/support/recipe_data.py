"""What stands for the models and data sets of the recipes: tiny models, and images drawn at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

SIZE = 32
"""Of the tiny models' images, in pixels."""

TINY = {
    "microsoft/resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"
    ),
    "google/mobilenet_v2": lambda: MobileNetV2Config(
        depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, expand_ratio=2, image_size=SIZE
    ),
    "google/vit": lambda: tiny_vit(),
    "facebook/deit": lambda: tiny_vit(),  # these checkpoints are stored as ViT
    "facebook/convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "microsoft/swin": lambda: SwinConfig(
        image_size=SIZE, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, patch_size=4
    ),
    "timm/vit_small": lambda: tiny_timm("vit_small_patch16_224", img_size=SIZE, embed_dim=32, depth=1, num_heads=2),
    "timm/mobilenetv2": lambda: tiny_timm("mobilenetv2_035"),
}
"""Start of a model's name on the Hub -> the configuration that stands for it."""

BREEDS, KINDS = ClassLabel(names=["a", "b", "c"]), ClassLabel(names=["cat", "dog"])
COLUMNS = {
    "ILSVRC/imagenet-1k": {"image": Image(), "label": BREEDS},
    "uoft-cs/cifar10": {"img": Image(), "label": BREEDS},
    "uoft-cs/cifar100": {"img": Image(), "fine_label": BREEDS, "coarse_label": KINDS},
    "dpdl-benchmark/oxford_flowers102": {"image": Image(), "label": BREEDS},
    "timm/oxford-iiit-pet": {"image": Image(), "label": BREEDS, "image_id": Value("string"), "label_cat_dog": KINDS},
}
SPLITS = {
    "ILSVRC/imagenet-1k": ("train", "validation", "test"),
    "uoft-cs/cifar10": ("train", "test"),
    "uoft-cs/cifar100": ("train", "test"),
    "dpdl-benchmark/oxford_flowers102": ("train", "validation", "test"),
    "timm/oxford-iiit-pet": ("train", "test"),
}
"""As on the Hub, with fewer classes and images."""


def tiny_vit() -> ViTConfig:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return ViTConfig(**sizes, image_size=SIZE, patch_size=16)


def tiny_timm(architecture: str, **model_args) -> TimmWrapperConfig:
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    return TimmWrapperConfig(
        architecture=architecture,
        model_args=model_args,
        pretrained_cfg={"input_size": [3, 224, 224], **normalization},
    )


def tiny_checkpoint(name: str, directory: Path) -> Path:
    """What stands for `name` on the Hub: another number of classes, so that the head is made anew."""
    (build,) = (build for start, build in TINY.items() if name.startswith(start))
    config = build()
    config.num_labels = 5
    config.initializer_range = 0.2  # with 0.02 so narrow a model hardly depends on its input
    model = AutoModelForImageClassification.from_config(config)
    settle_statistics(model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def settle_statistics(model: torch.nn.Module) -> None:
    """Batch norms as in a trained model: with the statistics of their inputs, not those they are born with."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    model.train()
    model(pixel_values=torch.randn(16, 3, SIZE, SIZE))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def generated_data(name: str, directory: Path) -> Path:
    """A directory of parquet files with the splits and columns of data set `name`."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    for split in SPLITS[name]:
        count = 16 if split == "train" else 6
        values: dict[str, list] = {}
        for column, feature in COLUMNS[name].items():
            if isinstance(feature, ClassLabel):
                values[column] = [i % feature.num_classes for i in range(count)]
            elif isinstance(feature, Image):
                values[column] = list(rng.integers(0, 256, (count, 40, 48, 3), dtype=np.uint8))
            else:
                values[column] = [str(i) for i in range(count)]
        Dataset.from_dict(values, features=Features(COLUMNS[name])).to_parquet(
            directory / f"{split}-00000-of-00001.parquet"
        )
    return directory

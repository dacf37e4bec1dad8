"""The models whose steps are timed: two small ones by default, others to see how costs grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

CLASSES = 10


@dataclass(frozen=True)
class StepModel:
    """How to build a model, and the side of its square images in pixels."""

    build: Callable[[], nn.Module]
    image_size: int


def _vit(width: int, heads: int, image_size: int = 224, patch_size: int = 16, depth: int = 12) -> StepModel:
    return StepModel(
        lambda: VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=CLASSES,
        ),
        image_size,
    )


MODELS: dict[str, StepModel] = {
    "vit-small-images": _vit(192, 3, image_size=32, patch_size=8, depth=4),
    "resnet18-small-images": StepModel(lambda: timm.create_model("resnet18", num_classes=CLASSES), 32),
    "vit-tiny-112": _vit(192, 3, image_size=112),
    "mobilenetv2-64": StepModel(lambda: timm.create_model("mobilenetv2_100", num_classes=CLASSES), 64),
    "vit-tiny": _vit(192, 3),
    "vit-small": _vit(384, 6),
    "vit-base": _vit(768, 12),
    "resnet18": StepModel(lambda: timm.create_model("resnet18", num_classes=CLASSES), 224),
    "resnet50": StepModel(lambda: timm.create_model("resnet50", num_classes=CLASSES), 224),
}
"""The small ones: four blocks of ViT-Ti on 32 x 32 pixels in patches of 8, and ResNet-18 on 32 x 32 pixels. ViT-Ti on
112 and MobileNetV2 on 64 pixels are of the sizes that docs/results.md trains."""

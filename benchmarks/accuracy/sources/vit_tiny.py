"""ViT-tiny/16 of transformers with pretrained weights, for images of another size than it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

MEAN = STD = (0.5, 0.5, 0.5)
"""What the checkpoint was trained with: pixels from -1 to 1."""
TRAINING: dict[str, Any] = {
    "float_per_seed": False,
    "bits": (4, 3, 2),
    "images_per_class": None,
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "learning_rates": (1e-4, 3e-4, 1e-3),
    "plain_learning_rates": (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3),
    "radii": (0.01, 0.03, 0.1, 0.3),
    "adaptive_radii": (0.1, 0.3, 1.0, 3.0),
    "tuned_at": 4,
    "precision": "bfloat16",
}
"""Fields of `Task` that all tasks with this model have."""
POSITIONS = "vit.embeddings.position_embeddings"


def build(classes: int, image_size: int) -> nn.Module:
    """12 blocks of width 192 with 3 heads on patches of 16 x 16 pixels, random weights, no dropout."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=image_size,
            hidden_size=192,
            num_attention_heads=3,
            intermediate_size=768,
            layer_norm_eps=1e-6,
            num_labels=classes,
            # Takes a third of the time of the fused kernel for so few tokens in bfloat16 on CPU.
            attn_implementation="eager",
        )  # type: ignore[call-arg]
    )


def pretrained(directory: Path, classes: int, image_size: int) -> nn.Module:
    """The model of [`build`] with the weights in `directory` and a new head."""
    return resized(ViTForImageClassification.from_pretrained(directory), build(classes, image_size), image_size)


@torch.no_grad()
def resized(source: ViTForImageClassification, target: nn.Module, image_size: int) -> nn.Module:
    """Copy the weights of `source` to `target`, in place, but for the head; returns `target`.

    Position embeddings are interpolated here, once, and are those of the new size ever after.

    Args:
        target: The same architecture for square images with a side of `image_size` pixels.

    Raises:
        RuntimeError: If names or shapes of other weights differ.
    """
    head = {name: value for name, value in target.state_dict().items() if name.startswith("classifier.")}
    kept = {name: value for name, value in source.state_dict().items() if not name.startswith("classifier.")}
    positions = target.get_parameter(POSITIONS)
    kept[POSITIONS] = source.vit.embeddings.interpolate_pos_encoding(positions, image_size, image_size)
    target.load_state_dict({**kept, **head})
    return target

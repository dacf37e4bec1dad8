"""A task that repeats in seconds: few handwritten digits, a tiny ViT, and the training step that schedules share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, quantize

from . import training_loop
from .images import Images, shuffled_batches
from .training_loop import adamw, fit

SPLIT_SEED = 0
BITS = 2
BATCH_SIZE = 30
WEIGHT_DECAY = 0.05


def load_split(pool: int, validation: int) -> tuple[Images, Images, Images]:
    """scikit-learn's 1,797 digits: `pool` to draw training images from, `validation` to choose by, the rest to test.

    Which image goes where never changes for one pair of sizes.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    everything = Images(
        torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(bunch.target, dtype=torch.long)
    )
    if not 0 < pool < pool + validation < len(everything):
        raise ValueError(
            f"pool={pool}, validation={validation}: expected two positive numbers whose sum leaves some of the "
            f"{len(everything)} images to test on."
        )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED))
    everything = everything[order]
    end = pool + validation
    return everything[slice(0, pool)], everything[slice(pool, end)], everything[slice(end, None)]


def tiny_vit(seed: int) -> VisionTransformer:
    """4 patches of 4 x 4 pixels, one block of width 64 with 4 heads, 10 classes; no dropout."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=1,
        num_heads=4,
        mlp_ratio=2,
        weight_init="jax",  # Xavier; timm's usual 0.02 is made for hundreds of dimensions and slow to start here
    )


def small_cnn(seed: int) -> nn.Module:
    """Build four 3x3 convolutions of 8 to 32 channels with batch norms, an average over pixels and 10 classes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2)):
        convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def quantized(float_state: dict[str, Tensor], images: Images) -> nn.Module:
    """The float model quantized and calibrated on `images`."""
    model = tiny_vit(0)
    model.load_state_dict(copy.deepcopy(float_state))
    quantize(model, SAQQuantizationConfig(weight_bits=BITS, activation_bits=BITS))
    calibrate(model, [images.pixels])
    return model


def train(
    model: nn.Module,
    images: Images,
    epochs: int,
    lr: float,
    seed: int,
    saq: SAQConfig | None = None,
) -> dict[str, Any]:
    """AdamW with a cosine from `lr` to zero, in place.

    Args:
        seed: Of the order of the images, alike for all that train with it for as many epochs.
        saq: When and how to perturb; `None` or `case=None`: never.

    Returns:
        What [`fit`] returns, the loss averaged over the last epoch.
    """
    count = -(-len(images) // BATCH_SIZE)
    batches = shuffled_batches(images, BATCH_SIZE, torch.Generator().manual_seed(seed))
    optimizer = adamw(model, lr, WEIGHT_DECAY)
    return fit(model, map(Images.as_batch, batches), epochs * count, optimizer, saq, last=count)


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of `images` whose highest logit is that of their class, 0 to 1. Leaves `model` in evaluation mode."""
    return training_loop.accuracy(model, iter([images.as_batch()]))

"""Read images, and turn them into the inputs of a model: of one size, normalized, with augmentation for training."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import torch
from datasets import Dataset as HFDataset
from torch import Tensor
from torchvision.transforms import v2

from ..progress import with_progress
from .image_processors import check_makes_the_same, flips_channels, normalization
from .rgb import to_rgb

logger = logging.getLogger(__name__)


def transforms(
    processor: Any, image_size: int | tuple[int, int], augmentation: str
) -> tuple[v2.Transform, v2.Transform]:
    """Make training and evaluation transforms from a PIL image to `(3, height, width)`, normalized alike.

    Args:
        processor: Says how to normalize; pictures of the size that it makes become what it makes of them.
        image_size: Side of a square, or height and width, in pixels.

    Raises:
        ValueError: If `processor` does something to pixels that its usual fields do not say.
    """
    mean, std = normalization(processor)
    normalize = [
        v2.ToImage(),
        *([v2.Lambda(_flipped)] if flips_channels(processor) else []),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=mean, std=std),
    ]
    check_makes_the_same(processor, v2.Compose(normalize))
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    resize = [v2.Resize((height, width))]
    crops = augmentation in ("crop_flip", "rand_augment")
    if crops:
        train = [v2.RandomResizedCrop((height, width)), v2.RandomHorizontalFlip()]
        train += [v2.RandAugment()] if augmentation == "rand_augment" else []
    elif augmentation == "pad_crop_flip":
        # An eighth on each side, as the customary 4 of 32 pixels.
        padding = [width // 8, height // 8]
        train = [*resize, v2.RandomCrop((height, width), padding=padding), v2.RandomHorizontalFlip()]
    elif augmentation == "shift":
        train = [*resize, v2.RandomCrop((height, width), padding=1)]
    else:
        train = resize
    # Keep proportions where a square is cut out; the shortest edge alone would not cover another shape.
    larger = round(height / 0.875) if height == width else (round(height / 0.875), round(width / 0.875))
    evaluation = [v2.Resize(larger), v2.CenterCrop((height, width))] if crops else resize
    return v2.Compose([*train, *normalize]), v2.Compose([*evaluation, *normalize])


def _flipped(image: Tensor) -> Tensor:
    return image.flip(-3)


class UnreadableImageError(ValueError):
    """Names an image that cannot be read, and why. The last line of its text says all."""


class TransformedImages(torch.utils.data.Dataset):
    """Holds a dataset of images with a transform: `{"pixel_values": (3, H, W), "labels": int}`."""

    def __init__(self, dataset: HFDataset, transform: v2.Transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        row = readable_row(self.dataset, int(index))
        return {"pixel_values": self.transform(row["image"]), "labels": row["label"]}


def readable_row(dataset: HFDataset, index: int) -> dict:
    """Return row `index` with its `image` in RGB.

    Raises:
        UnreadableImageError: If the image cannot be read, or has more than 8 bits a channel.
    """
    try:
        row = dataset[index]
        return {**row, "image": to_rgb(row["image"])}
    except Exception as error:  # decoders raise errors of any kind
        stored = dataset.cast_column("image", datasets.Image(decode=False))[index]["image"]
        name = f"image {index}" if stored["path"] is None else stored["path"]
        raise UnreadableImageError(
            f"{name} cannot be read as an image ({' '.join(str(error).split())}). Replace or remove it, or leave out "
            "all such images with --skip_corrupt."
        ) from error


def without_unreadable(dataset: HFDataset, split: str) -> HFDataset:
    """Return `dataset` without the rows whose image cannot be read, which a warning names; it reads every image."""
    kept, reasons = [], []
    for index in with_progress(range(len(dataset)), f"reading images ({split})"):
        try:
            readable_row(dataset, index)
            kept.append(index)
        except UnreadableImageError as error:
            reasons.append(str(error).split(". Replace")[0])
    if not kept:
        raise ValueError(f"Split {split!r}: none of {len(dataset):,} images can be read. The first: {reasons[0]}.")
    if reasons:
        logger.warning(
            "Split %r: %s of %s images are left out:\n%s",
            split,
            f"{len(reasons):,}",
            f"{len(dataset):,}",
            "\n".join(reasons[:20]),
        )
    return dataset.select(kept) if reasons else dataset

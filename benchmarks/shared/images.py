"""Labelled images as tensors, small enough to stay in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""`pixels` `(n, channels, height, width)`, float32, and `labels` `(n,)`: what models are trained and scored on."""


@dataclass(frozen=True)
class Images:
    """Images and their classes.

    Attributes:
        pixels: `(count, channels, height, width)`, of any type.
        labels: `(count,)`, int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def as_batch(self) -> Batch:
        """All of them as they are."""
        return {"pixels": self.pixels, "labels": self.labels}


def draw(images: Images, count: int, seed: int) -> Images:
    """`count` of `images`, another choice for each seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:count]]


def draw_per_class(images: Images, count: int, seed: int) -> Images:
    """`count` images of each class, or all that a class has; another choice for each seed.

    For one seed, more images include those that are drawn when there are fewer.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    kept = [order[labels == label][:count] for label in labels.unique()]
    return images[torch.cat(kept).sort().values]


def split_per_class(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """`share` of the images of each class, rounded, and the others; both in the order of `images`."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    taken = torch.zeros(len(images), dtype=torch.bool)
    for label in labels.unique():
        of_class = order[labels == label]
        taken[of_class[: round(share * len(of_class))]] = True
    return images[taken], images[~taken]


def shuffled_batches(images: Images, batch_size: int, generator: torch.Generator) -> Iterator[Images]:
    """Batches without end, every epoch in a random order of its own; its last batch may be smaller."""
    while True:
        order = torch.randperm(len(images), generator=generator)
        for part in order.split(batch_size):
            yield images[part]


def crop_and_mirror(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut a square out of each image at a random place, and mirror half of them.

    Args:
        pixels: `(batch, channels, side, side)`, with `side >= size`.

    Returns:
        A new tensor `(batch, channels, size, size)` of the same type.
    """
    count, _, side, _ = pixels.shape
    shift = torch.randint(side - size + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.arange(size)
    rows = shift[0] + across
    columns = shift[1] + torch.where(mirrored, across.flip(0), across)
    taken = pixels[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2)


def center_crop(pixels: Tensor, size: int) -> Tensor:
    """The middle `size x size` pixels, `(batch, channels, size, size)`."""
    first = (pixels.shape[-1] - size) // 2
    return pixels[..., first : first + size, first : first + size]


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`(pixels / 255 - mean) / std` per channel, float32, contiguous."""
    m, s = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(255 * m).div_(255 * s)

"""CIFAR-10 as tensors: read once from parquet files, then batches without an image decoder in the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torch import Tensor

from . import images
from .images import Batch, Images
from .stored_tensors import splits_made_once

SPLITS = ("train", "test")
SIZE = 32
PADDING = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixel values over 255, per channel: what the published CIFAR-10 weights were trained with."""


@dataclass(frozen=True)
class Cifar:
    """The official splits: 50,000 images to train and 10,000 to test."""

    train: Images
    test: Images


def load_cifar(directory: str | Path, cache: str | Path) -> Cifar:
    """Read the splits `train` and `test` of `directory`; the decoded tensors are kept in the directory `cache`.

    Args:
        directory: Holds parquet files with a column of images and a column of class labels.
        cache: Where the tensors go, in a file whose name tells of the parquet files' names, sizes and dates.

    Raises:
        FileNotFoundError: If there are no parquet files in `directory`.
        ValueError: If a split or column is missing, or an image is not 32x32.
    """
    directory, cache = Path(directory), Path(cache)
    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"--data {str(directory)!r}: found no parquet files; expected CIFAR-10 as *.parquet with the splits train "
            "and test, an image column and a label column."
        )

    @lru_cache(maxsize=1)
    def splits() -> DatasetDict:
        found = load_dataset(str(directory), cache_dir=str(cache / "datasets"))
        missing = [name for name in SPLITS if name not in found]
        if missing:
            raise ValueError(f"--data {str(directory)!r}: no split {missing}; found {sorted(found)}.")
        return found

    stored = cache / f"cifar-{_fingerprint(files)}.safetensors"
    return Cifar(*splits_made_once(stored, SPLITS, lambda name: _decode(splits()[name], f"{directory} {name}")))


def _fingerprint(files: list[Path]) -> str:
    told = "\n".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _decode(split: Dataset, where: str) -> Images:
    columns = []
    for kind in (Image, ClassLabel):
        found = [name for name, feature in split.features.items() if isinstance(feature, kind)]
        if not found:
            raise ValueError(f"{where}: no column of type {kind.__name__}; found {split.features}.")
        columns.append(found[0])
    pixels = np.empty((len(split), SIZE, SIZE, 3), dtype=np.uint8)
    for i, image in enumerate(split[columns[0]]):
        if image.size != (SIZE, SIZE):
            raise ValueError(f"{where}: image {i} has {image.size} pixels; expected {(SIZE, SIZE)}.")
        pixels[i] = np.asarray(image.convert("RGB"))
    labels = torch.tensor(split[columns[1]][:], dtype=torch.int64)
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def normalize(pixels: Tensor) -> Tensor:
    """`(pixels / 255 - MEAN) / STD`, float32, contiguous."""
    return images.normalize(pixels, MEAN, STD)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels, black outside of it, and mirror half of them (arXiv:1512.03385, 4.2).

    Args:
        pixels: `(batch, 3, 32, 32)`, uint8.

    Returns:
        A new tensor of the same shape and type.
    """
    return images.crop_and_mirror(F.pad(pixels, (PADDING,) * 4), SIZE, generator)


def training_batches(training: Images, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Augmented, normalized batches without end: every epoch in a random order of its own, without its last images
    where they do not fill a batch.

    Raises:
        ValueError: If there are fewer images than `batch_size`.
    """
    if len(training) < batch_size:
        raise ValueError(
            f"training_batches: {len(training)} images do not fill a batch of {batch_size}; use a smaller."
        )
    while True:
        order = torch.randperm(len(training), generator=generator)
        for start in range(0, len(training) - batch_size + 1, batch_size):
            batch = training[order[start : start + batch_size]]
            yield {"pixels": normalize(augment(batch.pixels, generator)), "labels": batch.labels}


def evaluation_batches(shown: Images, batch_size: int = 500) -> Iterator[Batch]:
    """Every image once, normalized, in order."""
    for start in range(0, len(shown), batch_size):
        batch = shown[slice(start, start + batch_size)]
        yield {"pixels": normalize(batch.pixels), "labels": batch.labels}

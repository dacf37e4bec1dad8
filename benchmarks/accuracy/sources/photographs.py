"""Photographs of many sizes as tensors of one: read once from parquet files, squares cut out of their middles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...shared.images import Images
from ...shared.stored_tensors import splits_made_once


def load_photographs(directory: Path, splits: Sequence[str], size: int, stored: Path) -> list[Images]:
    """Read `splits` of `directory` as uint8 `(count, 3, size, size)`; the decoded tensors are kept in `stored`.

    Args:
        directory: Holds parquet files with a column of images and a column of class labels, one split `train` and one
            `test` among them.
        size: The shorter side is resized to so many pixels, the middle of the longer one kept.
    """
    return splits_made_once(stored, splits, lambda split: _decode(directory, split, size, stored.parent / "datasets"))


def _decode(directory: Path, split: str, size: int, cache: Path) -> Images:
    # Decoded images are enough for a machine without the library that reads the files.
    from torchvision.transforms import v2

    from hf_saq.data import DataTrainingArguments, load_images

    named = DataTrainingArguments(dataset_name=str(directory), eval_split="test" if split == "train" else split)
    rows = load_images(named, seed=0, cache_dir=str(cache))["train" if split == "train" else "eval"]
    resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    pixels = torch.stack([resize(row["image"].convert("RGB")) for row in rows])
    return Images(pixels, torch.tensor(rows["label"][:]))

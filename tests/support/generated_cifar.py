"""Splits of random images in the files that the benchmarks read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image


def write_split(directory: Path, split: str, count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Write `count` random images, losslessly, as `<split>-00000-of-00001.parquet`.

    Returns:
        Pixels `(count, 32, 32, 3)`, uint8, and labels.
    """
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, count).tolist()
    features = Features({"img": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    dataset = Dataset.from_dict({"img": list(pixels), "label": labels}, features=features)
    dataset.to_parquet(str(directory / f"{split}-00000-of-00001.parquet"))
    return pixels, labels

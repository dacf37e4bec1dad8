"""Small pictures in folders, and what `load_images` makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hf_saq.data import DataTrainingArguments, load_images


def image_files(root: Path, *names: str) -> Path:
    """Write pictures of 8 x 8 pixels of noise below `root`, and return it."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name)
    return root


def load(**given):
    """`load_images` with these arguments and seed 0."""
    return load_images(DataTrainingArguments(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}), 0)

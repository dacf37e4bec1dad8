"""Images on disk for the commands that run a saved model on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import IMAGE_SIZE

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Four images of each class in the split `val`."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for k in range(4):
                pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root

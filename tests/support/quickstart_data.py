"""Tiny stand-ins for the model and the data set of the quickstart, as directories of the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

MODEL, DATA = "WinKawaks/vit-tiny-patch16-224", "AI-Lab-Makerere/beans"
LABELS = ["angular_leaf_spot", "bean_rust", "healthy"]


def lay_out(directory: Path) -> None:
    """Write a ViT of one block with its image processor, and 15 random images, below `directory`."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(directory / MODEL)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory / MODEL)
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "labels": ClassLabel(names=LABELS)})
    for split, count in (("train", 9), ("validation", 3), ("test", 3)):
        images = [Picture.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]
        rows = {"image": images, "labels": [k % 3 for k in range(count)]}
        file = directory / DATA / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(file)

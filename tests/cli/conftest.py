"""Images and models on disk for the commands that run a saved model on images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, VIT_SIZES
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize

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


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """`float`, `latent` and `packed`: one model, whose classes are numbered in another order than the data's."""
    directory, model = (
        tmp_path_factory.mktemp("saved"),
        ViTForImageClassification(ViTConfig(**{**VIT_SIZES, "num_labels": 3})),
    )
    model.config.id2label = {0: "cat", 1: "ant", 2: "bee"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(directory / "float")
    model = quantize(model, SAQQuantizationConfig(weight_bits=3, activation_bits=4))
    calibrate(model, [torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)])
    model.save_pretrained(directory / "latent")
    pack(model).save_pretrained(directory / "packed")
    processor = ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for name in ("float", "latent", "packed"):
        processor.save_pretrained(directory / name)
    return directory

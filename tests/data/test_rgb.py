"""Pictures of more than 8 bits are refused: Pillow would make them white or black without a word."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from hf_saq.data import (
    DataTrainingArguments,
    TransformedImages,
    UnreadableImageError,
    load_images,
    to_rgb,
    transforms,
    without_unreadable,
)
from hf_saq.timing.inputs import images_for

GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
DEEP = {
    "i16.png": (GRAY.astype(np.uint16) * 257, "I;16"),
    "i16.tif": (GRAY.astype(np.uint16) * 257, "I;16"),
    "big.tif": (GRAY.astype(">u2") * 257, "I;16B"),
    "i32.tif": (GRAY.astype(np.int32) * 257, "I"),
    "float.tif": (GRAY.astype(np.float32) / 255, "F"),
}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Of each class every deep kind and one with 8 bits."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for file, (pixels, mode) in DEEP.items():
            picture = Image.frombytes(mode, pixels.shape[::-1], pixels.tobytes())
            picture.save(tmp_path / name / file)
        Image.fromarray(GRAY).save(tmp_path / name / "gray.png")
    yield tmp_path
    gc.collect()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_eight_bits_become_rgb(mode):
    """Those whose pixels say the same in RGB keep them."""
    picture = Image.fromarray(GRAY).convert(mode)
    found = to_rgb(picture)
    assert found.mode == "RGB" and found.size == (8, 8)
    if mode != "1":
        assert np.abs(np.asarray(found).astype(int) - GRAY[..., None]).max() <= 2


@pytest.mark.parametrize("file", DEEP)
def test_more_bits_are_refused_by_name(file, pictures):
    where = DataTrainingArguments(train_dir=str(pictures), validation_dir=str(pictures))
    images = load_images(where, 0)["eval"]
    paths = sorted(str(path) for path in pictures.rglob("*.*"))
    data = TransformedImages(images, transforms(ViTImageProcessor(size={"height": 8, "width": 8}), 8, "none")[1])
    path = str(pictures / "cat" / file)
    with pytest.raises(UnreadableImageError) as refused:
        data[paths.index(path)]
    said = str(refused.value)
    assert said.startswith(f"{path} cannot be read as an image (its mode is 'I") or "'F', floating-point" in said
    assert "expected 8 bits a channel: scale its values to 0 to 255 and save it with 8 bits)" in said


def test_skip_corrupt_leaves_them_out(pictures, caplog):
    images = load_images(DataTrainingArguments(train_dir=str(pictures), validation_dir=str(pictures)), 0)["eval"]
    with caplog.at_level(logging.WARNING):
        kept = without_unreadable(images, "eval")
    assert kept["label"] == [0, 1] and "Split 'eval': 10 of 12 images are left out" in caplog.text
    assert all(np.array_equal(np.asarray(row["image"]), GRAY) for row in kept)


def test_timing_refuses_them_too(pictures):
    """And what is no picture at all."""
    model = nn.Conv2d(3, 4, 3)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match=r"cat/i16\.png cannot be read as an image \(its mode is 'I;16', integers of"):
        images_for(model, processor, pictures, None)
    for name in ("cat", "dog"):
        (pictures / name / "i16.png").unlink()
    found, told = images_for(model, processor, pictures, None)
    assert told == "2 pictures" and found.shape == (2, 3, 8, 8)
    (pictures / "cat" / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cat/text\.png cannot be read as an image \(cannot identify"):
        images_for(model, processor, pictures, None)

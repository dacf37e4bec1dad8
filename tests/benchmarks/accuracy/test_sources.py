"""Images and models that tasks start from: tiny stand-ins, and the real files where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.accuracy.arguments import AccuracyArguments
from benchmarks.accuracy.sources import vit_tiny
from benchmarks.accuracy.sources.photographs import load_photographs
from benchmarks.accuracy.task import Paths
from benchmarks.accuracy.tasks import TASKS, caltech_vit, caltech_vit_few, flowers_efficientnet

REAL = AccuracyArguments().paths()


def small_vit(image_size: int, classes: int) -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=image_size, num_labels=classes, **sizes)).eval()


def test_positions_are_interpolated_once():
    """Exactly what transformers computes in every forward, and the head is the new one."""
    source, target = small_vit(64, 5), small_vit(32, 3)
    head = target.classifier.weight.clone()
    vit_tiny.resized(source, target, 32)
    x = torch.randn(2, 3, 32, 32)
    expected = source.vit(x, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(target.vit(x).last_hidden_state, expected, rtol=0, atol=0)
    assert torch.equal(target.classifier.weight, head) and target(x).logits.shape == (2, 3)
    assert target.config.image_size == 32


def written(directory: Path, counts: dict[str, int]) -> Path:
    """Parquet files of pictures 12 x 8 whose middle 8 x 8 have the grey value of their class, 0 to 2."""
    directory.mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for split, count in counts.items():
        labels = [i * 3 // count for i in range(count)]  # class by class
        pictures = []
        for label in labels:
            picture = Pictures.new("L", (12, 8), 255)
            picture.paste(label, (2, 0, 10, 8))
            pictures.append(picture)
        rows = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows.to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return directory


def test_photographs_are_decoded_once(tmp_path):
    directory = written(tmp_path / "data", {"train": 6, "test": 3})
    stored = tmp_path / "cache" / "photographs.safetensors"
    train, test = load_photographs(directory, ("train", "test"), 8, stored)
    for found, count in ((train, 6), (test, 3)):
        assert found.pixels.shape == (count, 3, 8, 8) and found.pixels.dtype == torch.uint8
        assert torch.equal(found.pixels, found.labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8))
    for path in directory.iterdir():
        path.unlink()
    again, _ = load_photographs(directory, ("train", "test"), 8, stored)
    assert torch.equal(again.pixels, train.pixels)


def test_validation_images_of_caltech_are_training_images_set_aside(tmp_path, monkeypatch):
    """A fifth of each class, never in the training images; pixels from -1 to 1."""
    monkeypatch.setattr(caltech_vit, "STORED_SIZE", 8)
    monkeypatch.setattr(caltech_vit, "SIZE", 6)
    places = dict.fromkeys(Paths.__dataclass_fields__, tmp_path / "nowhere")
    places |= {"caltech": written(tmp_path / "data", {"train": 30, "test": 6}), "cache": tmp_path}
    data = caltech_vit.load(Paths(**places))
    assert data.validation.labels.bincount().tolist() == [2, 2, 2]
    assert data.training.labels.bincount().tolist() == [8, 8, 8] and len(data.test) == 6
    assert data.training.labels[:8].bincount().tolist() != [8]  # mixed
    batch = next(data.training_batches(data.training, 4, 0))
    assert batch["pixels"].shape == (4, 3, 6, 6)
    torch.testing.assert_close(batch["pixels"][:, 0, 0, 0], batch["labels"] / 127.5 - 1)
    monkeypatch.setattr(caltech_vit_few, "IMAGES_PER_CLASS", 3)
    few = caltech_vit_few.load(Paths(**places))
    assert few.training.labels.bincount().tolist() == [3, 3, 3]
    assert torch.equal(few.validation.pixels, data.validation.pixels) and torch.equal(
        few.test.pixels, data.test.pixels
    )


@pytest.mark.skipif(not REAL.vit_tiny.exists(), reason=f"{REAL.vit_tiny} is not there")
def test_the_pretrained_vit_for_half_the_side():
    model = vit_tiny.pretrained(REAL.vit_tiny, 102, 112)
    TASKS["flowers-vit"].build().load_state_dict(model.state_dict())
    assert model.get_parameter(vit_tiny.POSITIONS).shape == (1, 50, 192)


@pytest.mark.skipif(not REAL.efficientnet.exists(), reason=f"{REAL.efficientnet} is not there")
def test_the_pretrained_efficientnet():
    model = flowers_efficientnet.pretrained(REAL.efficientnet)
    TASKS["flowers-efficientnet"].build().load_state_dict(model.state_dict())
    normalized = TASKS["flowers-efficientnet"].load.keywords
    assert [round(255 * normalized[name][0]) for name in ("mean", "std")] == [127, 128]

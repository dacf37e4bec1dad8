"""Splits, augmentation and processors of the example scripts."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from recipe_data import generated_data, tiny_checkpoint
from tiny_models import TRANSFORMERS_MODELS
from transformers import AutoImageProcessor, EfficientNetImageProcessor, ViTImageProcessor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from image_model import ModelArguments, load_model, load_processor  # noqa: E402

from hf_saq.data import (  # noqa: E402
    AUGMENTATIONS,
    DataTrainingArguments,
    input_size,
    load_images,
    normalization,
    transforms,
)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory) -> str:
    """16 training, 6 validation and 6 test images."""
    return str(generated_data("dpdl-benchmark/oxford_flowers102", tmp_path_factory.mktemp("data") / "flowers"))


@pytest.mark.parametrize(
    ("splits", "train", "held_out"),
    [
        ({}, 16, "validation"),
        ({"eval_split": "test"}, 16, "test"),
        ({"train_split": "train+validation"}, 22, "test"),  # not the validation part that it trains on
        ({"train_split": "validation", "eval_split": "test"}, 6, "test"),
    ],
    ids=str,
)
def test_which_splits_are_used(splits, train, held_out, flowers):
    images = load_images(DataTrainingArguments(dataset_name=flowers, **splits), seed=0)
    assert len(images["train"]) == train and len(images["eval"]) == 6
    alone = load_images(DataTrainingArguments(dataset_name=flowers, eval_split=held_out), seed=0)
    for ours, expected in zip(images["eval"], alone["eval"], strict=True):
        assert np.array_equal(np.asarray(ours["image"]), np.asarray(expected["image"]))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train_split": "train+extra"},
            r"--train_split 'train\+extra'; the dataset has the splits \['test',",
        ),
        ({"train_split": "train+test", "eval_split": "test"}, r"--eval_split 'test' is trained on"),
        ({"eval_split": "val"}, r"--eval_split 'val'; the dataset has the splits"),
    ],
)
def test_mistaken_splits(splits, message, flowers):
    with pytest.raises(ValueError, match=message):
        load_images(DataTrainingArguments(dataset_name=flowers, **splits), seed=0)


SHADES = {"ant": 10, "bee": 100, "cat": 200}


def folders(root: Path, classes: list[str]) -> str:
    """Two images of each class, of its shade."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(2):
            Image.new("L", (8, 8), SHADES[name]).save(root / name / f"{k}.png")
    return str(root)


def strings(root: Path, train: list[str], validation: list[str]) -> str:
    """The same as parquet files with names for labels."""
    root.mkdir()
    for split, classes in (("train", train), ("validation", validation)):
        rows = {"image": [Image.new("L", (8, 8), SHADES[name]) for name in classes], "label": classes}
        features = Features({"image": ImageFeature(), "label": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return str(root)


@pytest.mark.parametrize("kind", ["folders", "strings"])
def test_a_split_without_some_of_the_classes_keeps_their_numbers(kind, tmp_path):
    """Each split by itself would call its own first class 0."""
    if kind == "folders":
        train, validation = (
            folders(tmp_path / "train", ["ant", "bee", "cat"]),
            folders(tmp_path / "val", ["bee", "cat"]),
        )
        args = DataTrainingArguments(train_dir=train, validation_dir=validation)
    else:
        args = DataTrainingArguments(dataset_name=strings(tmp_path / "data", ["ant", "bee", "cat"], ["cat", "bee"]))
    images = load_images(args, seed=0)
    assert images["eval"].features == images["train"].features
    for split in images.values():
        names = split.features["label"].names
        assert names == ["ant", "bee", "cat"]
        assert all(np.asarray(row["image"]).max() == SHADES[names[row["label"]]] for row in split)


def test_classes_that_are_not_trained_on_are_refused(tmp_path):
    train, validation = folders(tmp_path / "train", ["ant", "bee"]), folders(tmp_path / "val", ["bee", "cat"])
    with pytest.raises(ValueError, match=r"1 class\(es\) that training images lack, such as \['cat'\]"):
        load_images(DataTrainingArguments(train_dir=train, validation_dir=validation), seed=0)


def processor_with(mean: float, std: float):
    return ViTImageProcessor(image_mean=[mean] * 3, image_std=[std] * 3)


def test_pad_crop_flip_shows_a_window_of_the_padded_image():
    size, pad = 16, 2
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    train, evaluation = transforms(processor_with(0.25, 0.5), size, "pad_crop_flip")
    whole = (torch.tensor(pixels).permute(2, 0, 1) / 255 - 0.25) / 0.5
    torch.testing.assert_close(evaluation(Image.fromarray(pixels)), whole)
    padded = torch.full((3, size + 2 * pad, size + 2 * pad), (0 - 0.25) / 0.5)
    padded[:, pad:-pad, pad:-pad] = whole
    windows = [padded[:, y : y + size, x : x + size] for y, x in itertools.product(range(2 * pad + 1), repeat=2)]
    windows += [window.flip(-1) for window in windows]
    seen = set()
    for _ in range(60):
        found = train(Image.fromarray(pixels))
        (which,) = (k for k, window in enumerate(windows) if torch.allclose(found, window, atol=1e-6))
        seen.add(which)
    assert min(seen) < 25 <= max(seen)  # with and without the flip
    assert {k % 25 // 5 for k in seen} == {k % 5 for k in seen} == {0, 1, 2, 3, 4}  # as far as the padding goes


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_augmentation_gives_the_same_shape(augmentation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for transform in transforms(processor_with(0.5, 0.5), 24, augmentation):
        result = transform(image)
        assert result.shape == (3, 24, 24) and result.dtype == torch.float32 and result.abs().max() <= 1


def test_rand_augment_does_more_than_crop_and_flip():
    """A crop of an image of one colour is that colour; some random operations change it. Evaluation is the same."""
    image = Image.new("RGB", (40, 40), (200, 60, 120))
    seen = {}
    for augmentation in ("crop_flip", "rand_augment"):
        train, evaluation = transforms(processor_with(0.5, 0.5), 24, augmentation)
        seen[augmentation] = {tuple(train(image).amin(dim=(1, 2)).tolist()) for _ in range(20)}
        assert torch.equal(evaluation(image), evaluation(image).amin(dim=(1, 2), keepdim=True).expand(3, 24, 24))
    assert len(seen["crop_flip"]) == 1 < len(seen["rand_augment"])


@pytest.mark.parametrize("size", [None, 64])
def test_a_timm_checkpoint_has_a_processor(size, tmp_path):
    """It is read from the model's configuration, and `image_size` is saved there."""
    directory = tiny_checkpoint("timm/mobilenetv2_100", tmp_path / "model")
    arguments = ModelArguments(model_name_or_path=str(directory))
    model = load_model(arguments, ["a", "b"], size)
    processor = load_processor(arguments, model, size)
    assert normalization(processor) == ([0.5] * 3, [0.25] * 3) and input_size(processor) == (size or 224)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert saved(Image.new("RGB", (90, 90)))["pixel_values"].shape == (1, 3, size or 224, size or 224)


@pytest.mark.parametrize("family", ["resnet", "convnext", "vit", "mobilenet_v2"])
def test_processors_follow_image_size(family, tmp_path):
    """Those of ResNet and ConvNeXt, too, which want the shortest edge."""
    TRANSFORMERS_MODELS[family]().save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), from_scratch=True)
    processor = load_processor(arguments, load_model(arguments, ["a", "b"], 48), 48)
    assert input_size(processor) == 48
    assert np.shape(processor(Image.new("RGB", (90, 70)))["pixel_values"][0]) == (3, 48, 48)


def test_image_size_reaches_a_processor_whose_crop_is_switched_off(tmp_path):
    """EfficientNet's has the size of a crop that it does not do."""
    TRANSFORMERS_MODELS["vit"]().save_pretrained(tmp_path)
    EfficientNetImageProcessor().save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), from_scratch=True)
    model = load_model(arguments, ["a", "b"], 48)
    assert input_size(load_processor(arguments, model, None)) == 346
    processor = load_processor(arguments, model, 48)
    assert input_size(processor) == 48
    assert np.shape(processor(Image.new("RGB", (90, 70)))["pixel_values"][0]) == (3, 48, 48)

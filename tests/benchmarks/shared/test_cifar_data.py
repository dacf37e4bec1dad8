"""CIFAR as tensors: decoded once, normalized, flipped and shifted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from generated_cifar import write_split
from torchvision.transforms import v2

from benchmarks.shared import cifar_data
from benchmarks.shared.cifar_data import Images, augment, evaluation_batches, load_cifar, normalize, training_batches


@pytest.fixture
def written(tmp_path):
    pixels, labels = {}, {}
    for seed, (split, count) in enumerate((("train", 5), ("test", 3))):
        pixels[split], labels[split] = write_split(tmp_path / "data", split, count, seed)
    return tmp_path, pixels, labels


def test_images_and_labels_as_written(written):
    tmp_path, pixels, labels = written
    cifar = load_cifar(tmp_path / "data", tmp_path / "cache")
    for split in ("train", "test"):
        images = getattr(cifar, split)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.tolist() == labels[split]
        assert torch.equal(images.pixels.permute(0, 2, 3, 1), torch.from_numpy(pixels[split]))


def test_decoded_once_until_the_files_change(written, monkeypatch):
    tmp_path, *_ = written
    first = load_cifar(tmp_path / "data", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cifar_data, "load_dataset", None)
        assert torch.equal(load_cifar(tmp_path / "data", tmp_path / "cache").train.pixels, first.train.pixels)
    pixels, _ = write_split(tmp_path / "data", "test", 4, seed=9)
    changed = load_cifar(tmp_path / "data", tmp_path / "cache")
    assert torch.equal(changed.test.pixels.permute(0, 2, 3, 1), torch.from_numpy(pixels))


def test_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data .*absent.*no parquet files; expected CIFAR-10"):
        load_cifar(tmp_path / "absent", tmp_path / "cache")


def test_no_test_split(tmp_path):
    write_split(tmp_path / "data", "train", 2, seed=0)
    with pytest.raises(ValueError, match=r"no split \['test'\]; found \['train'\]"):
        load_cifar(tmp_path / "data", tmp_path / "cache")


def test_no_column_of_labels(tmp_path):
    (tmp_path / "data").mkdir()
    features = Features({"img": Image(), "label": Value("int64")})
    images = Dataset.from_dict({"img": [np.zeros((32, 32, 3), np.uint8)], "label": [1]}, features=features)
    for split in ("train", "test"):
        images.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="no column of type ClassLabel"):
        load_cifar(tmp_path / "data", tmp_path / "cache")


def test_another_size(tmp_path):
    (tmp_path / "data").mkdir()
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    images = Dataset.from_dict({"img": [np.zeros((28, 32, 3), np.uint8)], "label": [1]}, features=features)
    for split in ("train", "test"):
        images.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"image 0 has \(32, 28\) pixels; expected \(32, 32\)"):
        load_cifar(tmp_path / "data", tmp_path / "cache")


def random_images(count):
    return Images(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count))


def test_normalize_against_torchvision():
    pixels = random_images(3).pixels
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(cifar_data.MEAN, cifar_data.STD)])
    torch.testing.assert_close(normalize(pixels), reference(pixels), rtol=1e-5, atol=1e-6)


def test_augment_gives_shifted_and_mirrored_images():
    """Every result is one of torchvision's 81 crops of that image or of its mirror image, and all shifts appear."""
    pixels = random_images(200).pixels
    taken = augment(pixels, torch.Generator().manual_seed(0))
    assert taken.dtype == torch.uint8
    found = torch.full((200,), -1)
    choices = list(itertools.product((False, True), range(9), range(9)))
    padded = v2.functional.pad(pixels, [4])
    for i, (mirrored, top, left) in enumerate(choices):
        crop = v2.functional.crop(padded, top, left, 32, 32)
        crop = v2.functional.horizontal_flip(crop) if mirrored else crop
        found[(crop == taken).flatten(1).all(dim=1)] = i
    assert (found >= 0).all()
    seen = [choices[i] for i in found.tolist()]
    assert {top for _, top, _ in seen} == {left for _, _, left in seen} == set(range(9))
    assert 5 < sum(top == left for _, top, left in seen) < 50  # 22 expected if the two are independent
    assert 60 < sum(mirrored for mirrored, _, _ in seen) < 140  # 100 expected, standard deviation 7


def test_training_batches_cover_each_epoch():
    batches = training_batches(random_images(10), 4, torch.Generator().manual_seed(0))
    epochs = [[label for b in itertools.islice(batches, 2) for label in b["labels"].tolist()] for _ in range(2)]
    assert all(len(epoch) == len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="3 images do not fill a batch of 4"):
        next(training_batches(random_images(3), 4, torch.Generator()))


def test_evaluation_batches_are_all_images_in_order():
    images = random_images(5)
    batches = list(evaluation_batches(images, 2))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat([batch["pixels"] for batch in batches]), normalize(images.pixels))

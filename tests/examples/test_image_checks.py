"""What the example scripts say of image folders and tables that are not as they should be."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from image_folder_files import image_files, load
from PIL import Image
from transformers import ViTImageProcessor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from image_mistakes import unreadable_images_in_one_line  # noqa: E402

from hf_saq.data import (  # noqa: E402
    DataTrainingArguments,
    TransformedImages,
    UnreadableImageError,
    load_split,
    transforms,
    without_unreadable,
)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""`datasets` leaves files open: those that it fails to decode, and metadata files."""


@pytest.fixture(autouse=True)
def _no_open_files_for_later_tests():
    yield
    gc.collect()


FOLDERS = {
    "alone": (["a.png"], r"has no classes: 'a\.png' lies in no folder\. Expected one folder for each class"),
    "beside": (
        ["cat/1.png", "dog/1.png", "stray.png"],
        r"'stray\.png' lies beside the folders of the classes \['cat', 'dog'\].*move it into the folder of its class",
    ),
    "wrapped": (
        ["photos/cat/1.png", "photos/dog/1.png"],
        r"has only the folder 'photos' in it; name '.*wrapped/photos'",
    ),
    "nested": (
        ["cat/indoor/1.png", "dog/1.png"],
        r"'cat/indoor/1\.png' lies 2 folders deep, so its class could be 'cat' or 'indoor'",
    ),
    "nested alike": (["cat/in/1.png", "dog/out/1.png"], r"its class could be 'cat' or 'in'"),
    "single": (["cat/1.png", "cat/2.png"], r"has a single class, 'cat'; a classifier needs two"),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("flag", ["train_dir", "dataset_name"])
def test_folders_that_are_no_classes(kind, flag, tmp_path):
    names, message = FOLDERS[kind]
    with pytest.raises(ValueError, match=f"--{flag} '.*{kind}'.*{message}"):
        load(**{flag: image_files(tmp_path / kind, *names)})


def test_folders_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="holds no image but no file at all. Expected one folder for each class"):
        load(train_dir=tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="holds no image but 1 other files, such as 'cat/notes.txt'"):
        load(train_dir=tmp_path)
    with pytest.raises(ValueError, match="there is no such directory"):
        load(train_dir=tmp_path / "none")


def test_splits_are_no_classes(tmp_path):
    """A directory of a training and a validation folder, named as if it were the training folder."""
    image_files(tmp_path / "leaves", "train/cat/1.png", "train/dog/2.png", "validation/cat/3.png")
    message = (
        r"--train_dir '.*leaves' holds the splits \['train', 'validation'\], not classes; name one of them, such as"
    )
    with pytest.raises(ValueError, match=message + " '.*leaves/train', or the whole with --dataset_name"):
        load(train_dir=tmp_path / "leaves")


def test_classes_without_images_are_named(tmp_path, caplog):
    """One that is empty, and one whose images are of a kind that nobody reads."""
    image_files(tmp_path, "cat/1.png", "dog/2.png", "dog/3.png", "cat/4.png")
    (tmp_path / "elk").mkdir()
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "5.heic").write_bytes(b"x")
    splits = load(train_dir=tmp_path, validation_dir=tmp_path)
    assert f"--train_dir {str(tmp_path)!r}: no image lies in 'elk', 'fox', so there is no such class." in caplog.text
    assert splits["train"].features["label"].names == ["cat", "dog"]


def test_a_table_of_labels_by_another_name_is_told_of(tmp_path, caplog):
    """A training learned the years that pictures were taken in, which were the names of their folders."""
    for name, pictures in (("years", ["2020/1.png", "2021/2.png"]), ("together", ["pictures/1.png"])):
        image_files(tmp_path / name, *pictures)
        (tmp_path / name / "labels.csv").write_text("image,label\n1.png,cat\n")
    load(train_dir=tmp_path / "years", validation_dir=tmp_path / "years")
    told = "the classes are the folders '2020', '2021'. 'labels.csv' beside them is not read; a table of labels is"
    assert f"{told} called metadata.csv or metadata.jsonl, with the columns file_name and label." in caplog.text
    with pytest.raises(ValueError, match="single class, 'pictures'.*; 'labels.csv' is not read: a table of labels is"):
        load(dataset_name=tmp_path / "together")
    with pytest.raises(ValueError, match=r"labels\.csv': is a file; expected a directory, with metadata\.csv or"):
        load(dataset_name=tmp_path / "years" / "labels.csv")


def test_good_folders_are_taken(tmp_path):
    """Of the splits of a data set, of a split with one class, and of an image folder with a file of labels."""
    names = [f"{split}/{name}/{k}.png" for split in ("train", "test") for name in ("cat", "dog") for k in range(3)]
    splits = load(dataset_name=image_files(tmp_path / "splits", *names))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "eval": 6}
    val = image_files(tmp_path / "val", "dog/1.png", ".cache/deep/er/2.png")
    splits = load(train_dir=tmp_path / "splits" / "train", validation_dir=val)
    assert splits["eval"]["label"] == [1]
    table = image_files(tmp_path / "table", *(f"{k}.png" for k in range(8)))
    rows = "".join(f"{k}.png,{'cat' if k % 2 else 'dog'}\n" for k in range(8))
    (table / "metadata.csv").write_text(f"file_name,label\n{rows}")
    splits = load(train_dir=table, train_val_split=0.25)
    assert splits["train"].features["label"].names == ["cat", "dog"] and len(splits["eval"]) == 2


def test_a_class_too_small_to_hold_out_of(tmp_path):
    image_files(tmp_path, *(f"cat/{k}.png" for k in range(9)), "dog/0.png")
    with pytest.raises(
        ValueError, match=r"of 10 images cannot be held out with each of 2 classes: 'dog' has 1\. Give"
    ):
        load(train_dir=tmp_path, train_val_split=0.5)


# Tables --------------------------------------------------------------------------------------------------------------


def table(root: Path, labels, feature=None, images=None, split: str = "train") -> Path:
    root.mkdir(exist_ok=True)
    images = images or [Image.new("L", (8, 8), k) for k in range(len(labels))]
    features = Features({"image": ImageFeature(), "label": feature or ClassLabel(names=["ant", "bee"])})
    kept = Features({"image": ImageFeature(), "label": Value("int64") if feature is None else feature})
    data = Dataset.from_dict({"image": images, "label": labels}, features=kept)
    if feature is None:
        data = data.with_format(None)
        data.info.features = features  # classes beside numbers that nobody has compared with them
    data.to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("labels", [["ant", "bee"] * 4, [7, 9] * 4], ids=["strings", "numbers"])
def test_labels_without_names_become_classes(labels, tmp_path):
    kind = Value("string" if isinstance(labels[0], str) else "int64")
    splits = load(dataset_name=table(tmp_path / "data", labels, kind), train_val_split=0.25)
    assert splits["train"].features["label"].names == sorted(map(str, set(labels)))


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_labels_that_are_numbers_are_classes_in_the_order_of_the_numbers(kind, tmp_path):
    """Twelve classes, one of which no image has: class 10 came before class 2, as text does, also to the heads of
    models that had been trained on the numbers."""
    there = [k for k in range(13) if k != 7]
    rows = table(tmp_path / "data", there * 2, Value(kind), split="validation")
    name, split = load_split(DataTrainingArguments(dataset_name=str(rows)), seed=0)
    places = [there.index(k) for k in there * 2]
    assert name == "validation" and split["label"][:] == places
    assert [float(text) for text in split.features["label"].names] == there
    assert [image.getpixel((0, 0)) for image in split["image"]] == list(range(24))


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0.0, 1.0, float("nan")] * 2, Value("float32"), "2 of 6 rows have nothing in the column 'label', .* row 2"),
        ([[0], [1, 2], [0]], Sequence(Value("int64")), "'label' holds List.*; expected one class for each image"),
    ],
    ids=["NaN", "several"],
)
def test_labels_that_are_no_classes(labels, kind, message, tmp_path):
    """They ended in `KeyError: nan` and in a sentence about encodings."""
    rows = table(tmp_path / "data", labels, kind)
    with pytest.raises(ValueError, match=message):
        load_split(DataTrainingArguments(dataset_name=str(rows)), seed=0)


def test_hidden_labels_are_out_of_range(tmp_path):
    table(tmp_path / "data", [0, 1] * 4)
    table(tmp_path / "data", [0, -1, -1], split="test")
    message = (
        r"Split 'test': the column 'label' has -1 in row 1, and 2 of 3 rows are out of range; expected 0 to 1 for 2"
    )
    with pytest.raises(ValueError, match=message + r" classes\. Benchmarks hide labels as -1: take another split"):
        load(dataset_name=tmp_path / "data")


def test_labels_above_the_classes(tmp_path):
    message = r"has 5 in row 2, and 1 of 4 rows are out of range; expected 0 to 1 for 2 classes\. Correct them"
    with pytest.raises(ValueError, match=message):
        load(dataset_name=table(tmp_path / "data", [0, 1, 5, 1]))


def test_one_class_in_a_table(tmp_path):
    with pytest.raises(ValueError, match="The images have a single class, 'ant'; a classifier needs two or more"):
        load(dataset_name=table(tmp_path / "data", ["ant"] * 8, Value("string")))


@pytest.mark.parametrize("column", ["image", "label"])
def test_empty_rows(column, tmp_path, caplog):
    labels = ["ant", "bee"] * 4
    images = [Image.new("L", (8, 8), k) for k in range(8)]
    (images if column == "image" else labels)[5] = None
    data = table(tmp_path / "data", labels, Value("string"), images)
    message = (
        rf"Split 'train': 1 of 8 rows have nothing in the column '{column}', the first is row 5\. Remove them, or"
    )
    with pytest.raises(ValueError, match=message):
        load(dataset_name=data)
    with caplog.at_level(logging.WARNING):
        splits = load(dataset_name=data, skip_corrupt=True, train_val_split=0.3)
    assert len(splits["train"]) + len(splits["eval"]) == 7
    assert "Split 'train': 1 rows without image or label are left out." in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"image_column_name": "photo"},
            r"--image_column_name: there is no column 'photo'; the dataset has \['image',",
        ),
        ({"label_column_name": "species"}, "--label_column_name: there is no column 'species'"),
        ({"image_column_name": "label"}, "the column 'label' holds .*expected images, their paths or their bytes"),
    ],
)
def test_columns_that_are_not_there(given, message, tmp_path):
    data = table(tmp_path / "data", [0, 1] * 4, Value("int64"))
    with pytest.raises(ValueError, match=message):
        load(dataset_name=data, **given)


def test_columns_that_nobody_would_recognise(tmp_path):
    Dataset.from_dict({"a": [1, 2], "b": [3, 4]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match=r"no column of images was recognised; the dataset has \['a', 'b'\]\. Name the"
    ):
        load(dataset_name=tmp_path)


def test_paths_of_images_become_images(tmp_path):
    files = image_files(tmp_path / "files", *(f"{k}.png" for k in range(8)))
    rows = {"image": [str(files / f"{k}.png") for k in range(8)], "label": [0, 1] * 4}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    assert load(dataset_name=tmp_path / "data", train_val_split=0.25)["train"][0]["image"].size == (8, 8)


# Images that cannot be read ------------------------------------------------------------------------------------------


@pytest.fixture
def corrupt(tmp_path) -> Path:
    """Two classes of four images; one file is cut off, one is empty and one is text."""
    image_files(tmp_path, *(f"{name}/{k}.png" for name in ("cat", "dog") for k in range(4)))
    cut = tmp_path / "cat" / "1.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (tmp_path / "dog" / "2.png").write_bytes(b"")
    (tmp_path / "dog" / "3.png").write_text("no image")
    return tmp_path


def transformed(images) -> TransformedImages:
    processor = ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return TransformedImages(images, transforms(processor, 8, "none")[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_file_is_named(workers, corrupt, capsys):
    """In one line, also where a worker process met it, and with what to do."""
    data = transformed(load(train_dir=corrupt, validation_dir=corrupt)["train"])
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=workers)
    with pytest.raises(SystemExit) as stopped, unreadable_images_in_one_line():
        list(loader)
    said = str(stopped.value)
    assert said.startswith(f"error: {corrupt / 'cat' / '1.png'} cannot be read as an image (") and "\n" not in said
    assert said.endswith("Replace or remove it, or leave out all such images with --skip_corrupt.")


def test_an_image_of_a_table_is_named_by_its_row(tmp_path):
    images = [{"bytes": b"no image", "path": None}] * 8
    data = load(
        dataset_name=table(tmp_path / "data", ["ant", "bee"] * 4, Value("string"), images), train_val_split=0.25
    )
    with pytest.raises(UnreadableImageError, match=r"^image 3 cannot be read as an image"):
        transformed(data["train"])[3]


def test_skip_corrupt_leaves_them_out_and_names_them(corrupt, caplog):
    images = load(train_dir=corrupt, validation_dir=corrupt)["train"]
    with caplog.at_level(logging.WARNING):
        kept = without_unreadable(images, "train")
    assert "Split 'train': 3 of 8 images are left out" in caplog.text
    for name in ("cat/1.png", "dog/2.png", "dog/3.png"):
        assert str(corrupt / name) in caplog.text
    assert kept["label"] == [0, 0, 0, 1, 1] and len(list(transformed(kept))) == 5
    assert without_unreadable(kept, "train") is kept


def test_nothing_but_corrupt_files(tmp_path):
    images = [{"bytes": b"no image", "path": None}] * 8
    data = load(
        dataset_name=table(tmp_path / "data", ["ant", "bee"] * 4, Value("string"), images), train_val_split=0.25
    )
    with pytest.raises(
        ValueError, match=r"Split 'train': none of 6 images can be read\. The first: image 0 cannot be"
    ):
        without_unreadable(data["train"], "train")

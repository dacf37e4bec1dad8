"""Image folders are read whole, whatever words and signs their names have."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
from datasets import Image as ImageFeature
from datasets import load_dataset
from image_folder_files import image_files, load

from hf_saq.data import DataTrainingArguments, load_images, load_split

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""`datasets` leaves metadata files open."""


@pytest.fixture(autouse=True)
def _no_open_files_for_later_tests():
    yield
    gc.collect()


def files_and_classes(*splits) -> list[tuple[str, str]]:
    """The file and the name of the class of each row."""
    rows = []
    for split in splits:
        names = split.features["label"].names
        stored = split.cast_column("image", ImageFeature(decode=False))
        rows += [(row["image"]["path"], names[row["label"]]) for row in stored]
    return rows


def expected(root: Path) -> list[tuple[str, str]]:
    return sorted((str(file), file.parent.name) for file in root.rglob("*.png"))


FOLDERS = {
    "classes with words of splits": [
        f"{name}/{k}.png" for name in ("bus", "train-freight", "train-passenger") for k in range(4)
    ],
    "some files called train": [
        *(f"{name}/train_{k}.png" for name in ("rust", "smut") for k in range(2)),
        *(f"{name}/DSC{k}.png" for name in ("rust", "smut") for k in range(6)),
    ],
    "no file called train": [f"{name}/{name}_val.{k}.png" for name in ("rust", "smut") for k in range(4)],
    "one file called eval": [*(f"{name}/{k}.png" for name in ("rust", "smut") for k in range(4)), "smut/eval 3.png"],
    "a class called val": [f"{name}/{k}.png" for name in ("cat", "dog", "val") for k in range(4)],
    "a class called train": [f"{name}/{k}.png" for name in ("bus", "car", "train") for k in range(4)],
    "signs of patterns [1] *": [f"{name}/{k} [{k}]*.png" for name in ("a [b]", "c?") for k in range(4)],
}


@pytest.mark.parametrize("flag", ["train_dir", "dataset_name"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_file_is_read_with_its_folder_for_a_class(kind, flag, tmp_path):
    root = image_files(tmp_path / kind, *FOLDERS[kind])
    image_files(tmp_path / "signs of patterns 1 x", "a b/0.png", "c/1.png")  # what a pattern would match instead
    splits = load(**{flag: root}, train_val_split=0.25)
    assert sorted(files_and_classes(splits["train"], splits["eval"])) == expected(root)
    alone = load_images(DataTrainingArguments(train_dir=str(root), validation_dir=str(root)), 0)
    assert sorted(files_and_classes(alone["eval"])) == expected(root)
    name, split = load_split(DataTrainingArguments(dataset_name=str(root)), 0)
    assert name == "train" and sorted(files_and_classes(split)) == expected(root)


def test_names_without_words_are_read_as_datasets_reads_them(tmp_path):
    """In the same order, with the same classes: which images a seed draws stays what it was."""
    names = [f"{name}/{k}.png" for name in ("b", "B", "b x", "b-x", "b.c", "\u00e9") for k in (1, 2, 10, "a.b")]
    root = image_files(tmp_path / "data", *names, "b/._1.png", ".hidden/1.png", "__pycache__/1.png")
    theirs = load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))["train"]
    ours = load(train_dir=root, validation_dir=root)["train"]
    assert ours.features == theirs.features
    assert files_and_classes(ours) == files_and_classes(theirs) and len(ours) == 24


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "validation", "test"), ["test", "train", "validation"]),
        (("Training", "Val"), ["train", "validation"]),
        (("train", "valid", "dev"), ["train", "validation"]),
    ],
    ids=str,
)
def test_folders_of_splits_stay_splits(folders, splits, tmp_path):
    root = image_files(tmp_path, *(f"{s}/{c}/test {k}.png" for s in folders for c in ("cat", "train") for k in (1, 2)))
    for split in splits:
        name, found = load_split(DataTrainingArguments(dataset_name=str(root), eval_split=split), 0)
        own = [f for f in folders if split.startswith(f.lower()[:3]) or (split, f) == ("validation", "dev")]
        assert sorted(files_and_classes(found)) == sorted(row for f in own for row in expected(root / f)), name
    with pytest.raises(ValueError, match=rf"the dataset has the splits \[{', '.join(map(repr, splits))}\]"):
        load(dataset_name=root, eval_split="none")


def test_classes_are_numbered_over_all_splits(tmp_path):
    names = [*(f"train/{name}/1.png" for name in ("ant", "bee", "cat")), "test/bee/2.png", "test/cat/3.png"]
    splits = load(dataset_name=image_files(tmp_path, *names))
    assert splits["eval"].features["label"].names == ["ant", "bee", "cat"] and splits["eval"]["label"] == [1, 2]


def test_what_lies_beside_splits_is_named(tmp_path, caplog):
    names = [f"{split}/{name}/{k}.png" for split in ("train", "test") for name in ("cat", "dog") for k in (1, 2)]
    root = image_files(tmp_path, *names, "predict/1.png")
    assert {name: len(split) for name, split in load(dataset_name=root).items()} == {"train": 4, "eval": 4}
    assert "'predict' lies beside the folders of splits (test, train) and is not read." in caplog.text


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("flag", ["train_dir", "dataset_name"])
def test_metadata_names_files_with_any_words(flag, kind, tmp_path, caplog):
    """Those that it lists; others are counted."""
    files = ["test_1.png", "2.png", "val/3.png", "train [x].png", "5.png", "6.png"]
    root = image_files(tmp_path / "data [1]", *files, "unlisted.png")
    rows = [(file, "cat" if k % 2 else "dog") for k, file in enumerate(files)]
    lines = {
        "csv": ["file_name,label", *(f"{file},{label}" for file, label in rows)],
        "jsonl": [f'{{"file_name": "{file}", "label": "{label}"}}' for file, label in rows],
    }
    (root / f"metadata.{kind}").write_text("\n".join(lines[kind]) + "\n")
    if flag == "dataset_name":
        (root / "val").rename(root / "more")  # a folder of a split it would be there
        table = root / f"metadata.{kind}"
        table.write_text(table.read_text().replace("val/", "more/"))
        rows = [(file.replace("val/", "more/"), label) for file, label in rows]
    splits = load(**{flag: root}, train_val_split=0.34)
    assert sorted(files_and_classes(splits["train"], splits["eval"])) == sorted((str(root / f), n) for f, n in rows)
    assert "metadata lists 6 images, and 7 lie there; those that it lists are read." in caplog.text


def test_numbers_of_which_one_is_missing_in_one_split(tmp_path, caplog):
    """pandas reads 0, 1 and nothing as 0.0, 1.0 and nothing, and `datasets` wanted one type for all splits. What is
    left out is told, and was not listed any the less."""
    for split, labels in (("train", [0, 1, "", 1, 0, 1]), ("test", [1, 0, 1])):
        root = image_files(tmp_path / split, *(f"{k}.png" for k in range(len(labels))))
        lines = ["file_name,label", *(f"{k}.png,{label}" for k, label in enumerate(labels))]
        (root / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="Split 'train': 1 of 6 rows have nothing in the column 'label', .* is row 2"):
        load(dataset_name=tmp_path)
    splits = load(dataset_name=tmp_path, skip_corrupt=True)
    assert splits["train"].features["label"].names == splits["eval"].features["label"].names == ["0", "1"]
    assert splits["train"]["label"][:] == [0, 1, 1, 0, 1] and splits["eval"]["label"][:] == [1, 0, 1]
    assert "metadata lists" not in caplog.text


def test_metadata_in_each_split(tmp_path):
    for split in ("train", "test"):
        root = image_files(tmp_path / split, *(f"{k}.png" for k in range(4)))
        lines = ["file_name,label", *(f"{k}.png,{'cat' if k % 2 else 'dog'}" for k in range(4))]
        (root / "metadata.csv").write_text("\n".join(lines))
    for split in load(dataset_name=tmp_path).values():
        assert len(split) == 4 and Counter(name for _, name in files_and_classes(split)) == {"cat": 2, "dog": 2}


def test_a_card_that_names_the_files_of_splits_is_followed(tmp_path):
    root = image_files(tmp_path / "data", *(f"{c}/{s}{k}.png" for c in "ab" for s in ("x", "y") for k in range(2)))
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    card += ["  - {split: train, path: '*/x*.png'}", "  - {split: test, path: '*/y*.png'}", "---", "# Data", ""]
    (root / "README.md").write_text("\n".join(card))
    splits = load(dataset_name=root)
    assert [Path(path).name[0] for path, _ in files_and_classes(splits["train"])] == ["x"] * 4
    assert [Path(path).name[0] for path, _ in files_and_classes(splits["eval"])] == ["y"] * 4
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Data\nconfigs: none\n")
    assert sum(map(len, load(dataset_name=root, train_val_split=0.25).values())) == 8


def test_tables_in_a_directory_that_is_a_pattern_are_refused(tmp_path):
    (tmp_path / "data [1]").mkdir()
    (tmp_path / "data [1]" / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--dataset_name '.*data \[1\]': `datasets` takes .* Rename the directory"):
        load(dataset_name=tmp_path / "data [1]")

"""Read image folders: one folder for each class, and exactly the files that lie in it, whatever their names are.

`datasets` alone would take words such as `train`, `val` and `test` in the names of files and classes for splits, and
brackets in a path for a pattern.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, DatasetDict, Features, Image
from datasets import Dataset as HFDataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
"""Names of folders that hold a split, in small letters, and the split, as `datasets` has them."""
METADATA = (".csv", ".jsonl", ".parquet")
"""Endings of the `metadata` file that an image folder may have in place of folders for classes."""


METADATA_HINT = "metadata.csv or metadata.jsonl, with the columns file_name and label"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx")
"""Endings of files that may be meant to say what the classes are."""


@dataclass(frozen=True)
class ImageFiles:
    """Holds what lies in one directory: its images, relative to it and sorted, and where their labels are."""

    directory: Path
    images: tuple[Path, ...]
    has_metadata: bool
    """Whether a metadata file has the labels; otherwise the names of folders are the labels."""

    @property
    def pattern(self) -> str:
        """A pattern that matches all files below the directory, and nothing beside it."""
        return f"{glob.escape(str(self.directory.absolute()))}/**"


def check_image_folder(directory: Path, flag: str, least_classes: int = 2) -> ImageFiles:
    """List the images of `directory`, and refuse folders that leave open what the classes are.

    Raises:
        ValueError: If there is no image, or the classes are none, too few or not told by the folders.
    """
    where = f"{flag} {str(directory)!r}"
    files: list[Path] = []
    top: list[str] = []
    for parent, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]  # `datasets` skips them too
        top = top or sorted(folders)
        files += [Path(parent, name).relative_to(directory) for name in names if not name.startswith(".")]
    # Sort as `datasets` does: which images are drawn depends on it.
    images = sorted((file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS), key=Path.as_posix)
    if any(_is_metadata(file) for file in files):
        return ImageFiles(directory, tuple(images), has_metadata=True)
    expected = (
        "Expected one folder for each class with its images inside, such as "
        f"{directory.name}/cat/1.jpg and {directory.name}/dog/2.jpg"
    )
    table = next((file for file in sorted(files) if file.suffix.lower() in TABLES), None)
    if table is not None:
        expected += f"; {str(table)!r} is not read: a table of labels is called {METADATA_HINT}"
    if not images:
        instead = f"{len(files)} other files, such as {str(files[0])!r}" if files else "no file at all"
        raise ValueError(f"{where} holds no image but {instead}. {expected}.")
    loose = next((file for file in images if len(file.parts) == 1), None)
    nested = next((file for file in images if len(file.parts) > 2), None)
    classes = sorted({file.parts[0] for file in images if len(file.parts) > 1})
    if not classes:
        raise ValueError(f"{where} has no classes: {str(loose)!r} lies in no folder. {expected}.")
    if loose is not None:
        raise ValueError(
            f"{where}: {str(loose)!r} lies beside the folders of the classes {classes[:3]}. {expected}; move it into "
            "the folder of its class, or remove it."
        )
    if nested is not None and set(map(str.lower, classes)) <= set(SPLIT_FOLDERS):
        raise ValueError(
            f"{where} holds the splits {classes}, not classes; name one of them, such as "
            f"{str(directory / classes[0])!r}, or the whole with --dataset_name."
        )
    if nested is not None and len(classes) == 1:
        raise ValueError(f"{where} has only the folder {classes[0]!r} in it; name {str(directory / classes[0])!r}.")
    if nested is not None:
        raise ValueError(
            f"{where}: {str(nested)!r} lies {len(nested.parts) - 1} folders deep, so its class could be "
            f"{nested.parts[0]!r} or {nested.parts[-2]!r}. {expected}; move images into the folder of their class."
        )
    if len(classes) < least_classes:
        raise ValueError(f"{where} has a single class, {classes[0]!r}; a classifier needs two. {expected}.")
    empty = [name for name in top if name not in classes]
    if empty:
        logger.warning("%s: no image lies in %s, so there is no such class.", where, ", ".join(map(repr, empty[:5])))
    if table is not None and len(table.parts) == 1:
        logger.warning(
            "%s: the classes are the folders %s. %r beside them is not read; a table of labels is called %s.",
            where,
            ", ".join(map(repr, classes[:5])),
            str(table),
            METADATA_HINT,
        )
    return ImageFiles(directory, tuple(images), has_metadata=False)


def split_folders(directory: Path, flag: str) -> dict[str, list[Path]]:
    """Find the folders of splits in `directory`: by the split, empty where `directory` holds classes.

    A folder called `train` or `val` beside others is a class as they are if images alone lie in it.
    """
    inside = sorted(child for child in directory.iterdir() if not child.name.startswith((".", "__")))
    folders = [child for child in inside if child.is_dir()]
    named = [folder for folder in folders if folder.name.lower() in SPLIT_FOLDERS]
    others = [folder.name for folder in folders if folder not in named]
    metadata = [file.name for file in inside if _is_metadata(file)]
    if others and not metadata and not any(_holds_classes(folder) for folder in named):
        return {}
    splits: dict[str, list[Path]] = {}
    for folder in named:
        splits.setdefault(SPLIT_FOLDERS[folder.name.lower()], []).append(folder)
    unused = [*others, *metadata]
    if splits and unused:
        logger.warning(
            "%s %r: %s lies beside the folders of splits (%s) and is not read.",
            flag,
            str(directory),
            ", ".join(map(repr, unused[:5])),
            ", ".join(folder.name for folder in named),
        )
    return splits


def names_its_files(directory: Path) -> bool:
    """Say whether the card of a data set (README.md) tells `datasets` which files make which split."""
    card = directory / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] != ["---"]:
        return False
    header = itertools.takewhile(lambda line: line.rstrip() != "---", lines[1:])  # of YAML
    return any(line.startswith("configs:") for line in header)


def labelled_by_folder(splits: Mapping[str, Sequence[ImageFiles]]) -> DatasetDict:
    """Make splits of the columns `image` and `label`; classes are numbered in the order of their names, over all."""
    names = sorted({image.parts[0] for parts in splits.values() for part in parts for image in part.images})
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    made = DatasetDict()
    for split, parts in splits.items():
        images = [(part.directory.absolute() / image, image.parts[0]) for part in parts for image in part.images]
        rows = {"image": [str(path) for path, _ in images], "label": [name for _, name in images]}
        made[split] = HFDataset.from_dict(rows, features=features)
    return made


def _is_metadata(file: Path) -> bool:
    return file.stem == "metadata" and file.suffix in METADATA


def _holds_classes(folder: Path) -> bool:
    return any(
        (child.is_dir() and not child.name.startswith((".", "__"))) or _is_metadata(child)
        for child in folder.iterdir()
    )

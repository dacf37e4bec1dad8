"""Images and labels: from the Hub, from folders, from parquet files, or the handwritten digits of scikit-learn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from datasets import Dataset as HFDataset
from datasets.exceptions import DatasetGenerationError

from .augmentations import AUGMENTATIONS
from .image_checks import check_can_be_split, check_places, checked_rows, find_column
from .image_folders import ImageFiles, check_image_folder, labelled_by_folder, names_its_files, split_folders

logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    """Where the images come from and how many of them to use. With none of the sources set: handwritten digits."""

    _argument_group_name = "data: images and labels"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set on the Hub, or a directory of parquet files or image folders."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Training images: one folder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Held-out images: one folder for each class."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images to hold out where there is no other split."}
    )
    train_split: str = field(
        default="train", metadata={"help": "Split to train on; several are joined by a plus: train+validation."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: validation, else test, else train_val_split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many held-out images."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: the first column of images."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: the first column of labels."})
    skip_corrupt: bool = field(
        default=False,
        metadata={"help": "Read every image first, and leave out and name rows without one that can be read."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the square input, in pixels."})
    augmentation: str = field(
        default="crop_flip",
        metadata={
            "help": "Of training images: crop_flip (a part of the image, scaled), rand_augment (the same, then two "
            "random operations), pad_crop_flip (for small images), shift (one pixel, for digits) or none."
        },
    )

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"--augmentation {self.augmentation!r}; expected one of {list(AUGMENTATIONS)}.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split {self.train_val_split}; expected a share between 0 and 1.")
        if self.dataset_name and (self.train_dir or self.validation_dir):
            raise ValueError("--dataset_name and --train_dir/--validation_dir exclude each other; give one of them.")

    @property
    def is_digits(self) -> bool:
        return not (self.dataset_name or self.train_dir or self.validation_dir)


def load_images(
    args: DataTrainingArguments, seed: int, cache_dir: str | None = None, to_train: bool = False
) -> DatasetDict:
    """Load the splits `train` and `eval` with the columns `image` and `label`, the latter with class names.

    Args:
        to_train: Whether training images must be there. Held-out images alone, which have no split `train`, are
            enough otherwise.

    Raises:
        ValueError: If there is no such data, or it does not hold images with labels.
    """
    splits = _load_splits(args, seed, cache_dir)
    chosen = DatasetDict()
    train_names = args.train_split.split("+")
    if all(name in splits for name in train_names):
        chosen["train"] = _standard_columns(concatenate_datasets([splits[name] for name in train_names]), args)
    elif args.train_split != "train":
        raise ValueError(f"--train_split {args.train_split!r}; the dataset has the splits {sorted(splits)}.")
    name = args.eval_split or next((n for n in ("validation", "test") if n in splits and n not in train_names), None)
    if name in train_names:
        raise ValueError(f"--eval_split {name!r} is trained on (--train_split {args.train_split!r}); take another.")
    if args.eval_split and args.eval_split not in splits:
        raise ValueError(f"--eval_split {args.eval_split!r}; the dataset has the splits {sorted(splits)}.")
    if "train" not in chosen and (to_train or name is None):
        todo = "Give --train_dir" if args.validation_dir else "Name one or more of them with --train_split"
        raise ValueError(f"there are no images to train on; the data has the splits {sorted(splits)}. {todo}.")
    if name is not None:
        chosen["eval"] = _standard_columns(splits[name], args)
        if "train" in chosen:
            chosen["eval"] = _with_classes_of(chosen["train"], chosen["eval"])
    else:
        check_can_be_split(chosen["train"], args)
        parts = chosen["train"].train_test_split(args.train_val_split, seed=seed, stratify_by_column="label")
        chosen = DatasetDict(train=parts["train"], eval=parts["test"])
    names = chosen.get("train", chosen["eval"]).features["label"].names
    if len(names) < 2:
        raise ValueError(f"The images have a single class, {names[0]!r}; a classifier needs two or more.")
    for split, limit in (("train", args.max_train_samples), ("eval", args.max_eval_samples)):
        if limit is not None and split in chosen and limit < len(chosen[split]):
            chosen[split] = chosen[split].shuffle(seed=seed).select(range(limit))
    return chosen


def load_split(args: DataTrainingArguments, seed: int, cache_dir: str | None = None) -> tuple[str, HFDataset]:
    """Load one split whole, with the columns `image` and `label`: `eval_split`, else validation, test or the only one.

    Returns:
        The name of the split, and the split, of which `max_eval_samples` are drawn as [`load_images`] draws them.

    Raises:
        ValueError: If there is no such data, or it does not hold images with labels.
    """
    splits = _load_splits(args, seed, cache_dir)
    name = args.eval_split or next((n for n in ("validation", "test") if n in splits), None)
    if name is None and len(splits) == 1:
        name = next(iter(splits))
    if name is None or name not in splits:
        asked = "no split was named" if name is None else f"--eval_split {name!r}"
        raise ValueError(f"{asked}; the dataset has the splits {sorted(splits)}, name one of them.")
    found = _standard_columns(splits[name], args)
    if args.max_eval_samples is not None and args.max_eval_samples < len(found):
        found = found.shuffle(seed=seed).select(range(args.max_eval_samples))
    return name, found


def digits(seed: int = 0) -> DatasetDict:
    """Load 1,797 scans of handwritten digits, 8 x 8 pixels, from scikit-learn: 1,347 to train, 450 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16 * 255).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    dataset = HFDataset.from_dict({"image": list(images), "label": bunch.target.tolist()}, features=features)
    parts = dataset.train_test_split(450, seed=seed, stratify_by_column="label")
    return DatasetDict(train=parts["train"], validation=parts["test"])


def _load_splits(args: DataTrainingArguments, seed: int, cache_dir: str | None) -> DatasetDict:
    """Load all splits from where the arguments say, with checked rows."""
    check_places(args)
    if args.is_digits:
        return digits(seed)
    return _load_named(args, cache_dir) if args.dataset_name else _load_folders(args, cache_dir)


def _load_named(args: DataTrainingArguments, cache_dir: str | None) -> DatasetDict:
    assert args.dataset_name is not None
    flag, directory = "--dataset_name", Path(args.dataset_name)
    if directory.is_dir():
        tables = (file for file in directory.rglob("*.parquet") if file.stem != "metadata")
        if args.dataset_config_name is None and not any(tables) and not names_its_files(directory):
            splits = split_folders(directory, flag) or {"train": [directory]}
            checked = {split: [check_image_folder(each, flag) for each in parts] for split, parts in splits.items()}
            return _from_folders(args, checked, flag, cache_dir)
        if has_magic(str(directory.absolute())):
            raise ValueError(
                f"{flag} {args.dataset_name!r}: `datasets` takes *, ? and [ in a path for a pattern, which may match "
                "other directories. Rename the directory, or name it by a link without them."
            )
    return _checked(_loaded(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir), args)


def _load_folders(args: DataTrainingArguments, cache_dir: str | None) -> DatasetDict:
    splits = DatasetDict()
    for split, flag, directory, classes in (
        ("train", "--train_dir", args.train_dir, 2),
        ("validation", "--validation_dir", args.validation_dir, 1),
    ):
        if directory is not None:
            checked = {split: [check_image_folder(Path(directory), flag, classes)]}
            splits |= _from_folders(args, checked, flag, cache_dir)
    return splits


def _from_folders(
    args: DataTrainingArguments, splits: Mapping[str, Sequence[ImageFiles]], flag: str, cache_dir: str | None
) -> DatasetDict:
    """Make checked rows of the very files that were found; with metadata, of those that it lists."""
    if not any(part.has_metadata for parts in splits.values() for part in parts):
        return _checked(labelled_by_folder(splits), args)
    loaded = DatasetDict()
    for split, parts in splits.items():
        # Load each by itself: `datasets` wants columns of one type in all, and one missing number makes another of it.
        patterns = {split: [part.pattern for part in parts]}
        loaded |= _loaded("imagefolder", data_files=patterns, drop_labels=True, cache_dir=cache_dir)
        found = sum(len(part.images) for part in parts)
        if len(loaded[split]) != found:
            where = ", ".join(repr(str(part.directory)) for part in parts)
            logger.warning(
                "%s %s: metadata lists %s images, and %s lie there; those that it lists are read.",
                flag,
                where,
                f"{len(loaded[split]):,}",
                f"{found:,}",
            )
    return _checked(loaded, args)


def _loaded(source: str, *more: Any, **settings: Any) -> DatasetDict:
    """Load `source` with `datasets`."""
    try:
        return load_dataset(source, *more, **settings)
    except DatasetGenerationError as error:  # says what is wrong in its cause only
        raise ValueError(f"{settings.get('data_files', source)}: {error.__cause__ or error}") from error


def _checked(splits: DatasetDict, args: DataTrainingArguments) -> DatasetDict:
    return DatasetDict({name: checked_rows(split, name, args) for name, split in splits.items()})


def _standard_columns(dataset: HFDataset, args: DataTrainingArguments) -> HFDataset:
    image = find_column(dataset, args.image_column_name, "--image_column_name", Image)
    label = find_column(dataset, args.label_column_name, "--label_column_name", ClassLabel)
    columns = dataset.column_names
    dataset = dataset.select_columns([image, label])
    renames = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    dataset = dataset.rename_columns(renames) if renames else dataset
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel):
        return dataset
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float")):
        return _numbered_in_order(dataset)
    if not isinstance(feature, Value):
        raise ValueError(
            f"--label_column_name: the column {label!r} holds {feature}; expected one class for each image, a name or "
            f"a number. Name another column; the dataset has {columns}."
        )
    return dataset.class_encode_column("label")


def _numbered_in_order(dataset: HFDataset) -> HFDataset:
    """Make classes of numbers, in the order of the numbers: `datasets` sorts them as text, with 10 before 2, and a
    model that was trained on the numbers themselves would be shown other classes. Whole numbers are called 3 and not
    3.0 also where a missing label made floating-point numbers of them."""
    numbers = sorted(dataset.unique("label"))
    place = {number: k for k, number in enumerate(numbers)}
    return dataset.map(
        lambda labels: {"label": [place[label] for label in labels]},
        batched=True,
        input_columns=["label"],
        features=Features({**dataset.features, "label": ClassLabel(names=[_called(number) for number in numbers])}),
    )


def _called(number: float) -> str:
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _with_classes_of(training: HFDataset, evaluation: HFDataset) -> HFDataset:
    """Give `evaluation` the labels of the classes of `training`: each split numbers those that it has itself."""
    names, own = training.features["label"].names, evaluation.features["label"].names
    if own == names:
        return evaluation
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise ValueError(
            f"Images to evaluate on have {len(unknown)} class(es) that training images lack, such as {unknown[:3]}. "
            f"The {len(names)} classes of training: {names[:3]}... Remove those images or add training images."
        )
    numbers = [names.index(name) for name in own]
    return evaluation.map(
        lambda labels: {"label": [numbers[label] for label in labels]},
        batched=True,
        input_columns=["label"],
        features=training.features,
    )

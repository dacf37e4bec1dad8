"""Images and labels: from the Hub, from folders, from parquet files, or the handwritten digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, Features, Image, concatenate_datasets, load_dataset
from datasets import Dataset as HFDataset
from torchvision.transforms import v2

AUGMENTATIONS = ("crop_flip", "rand_augment", "pad_crop_flip", "shift", "none")


@dataclass
class DataTrainingArguments:
    """Where the images come from and how many of them to use. With none of the sources set: handwritten digits."""

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


def load_images(args: DataTrainingArguments, seed: int, cache_dir: str | None = None) -> DatasetDict:
    """Splits `train` and `eval` with the columns `image` and `label`, the latter with class names."""
    if args.is_digits:
        splits = digits(seed)
    elif args.dataset_name:
        splits = _load_named(args, cache_dir)
    else:
        splits = _load_folders(args, cache_dir)
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
    if name is not None:
        chosen["eval"] = _standard_columns(splits[name], args)
        if "train" in chosen:
            chosen["eval"] = _with_classes_of(chosen["train"], chosen["eval"])
    else:
        parts = chosen["train"].train_test_split(args.train_val_split, seed=seed, stratify_by_column="label")
        chosen = DatasetDict(train=parts["train"], eval=parts["test"])
    for split, limit in (("train", args.max_train_samples), ("eval", args.max_eval_samples)):
        if limit is not None and split in chosen and limit < len(chosen[split]):
            chosen[split] = chosen[split].shuffle(seed=seed).select(range(limit))
    return chosen


def digits(seed: int = 0) -> DatasetDict:
    """1,797 scans of handwritten digits, 8 x 8 pixels, from scikit-learn: 1,347 to train, 450 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16 * 255).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    dataset = HFDataset.from_dict({"image": list(images), "label": bunch.target.tolist()}, features=features)
    parts = dataset.train_test_split(450, seed=seed, stratify_by_column="label")
    return DatasetDict(train=parts["train"], validation=parts["test"])


def _load_named(args: DataTrainingArguments, cache_dir: str | None) -> DatasetDict:
    assert args.dataset_name is not None
    directory = Path(args.dataset_name)
    if not directory.is_dir():
        return load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir)
    if not any(directory.rglob("*.parquet")):
        _check_image_folder(directory, "--dataset_name")
    return load_dataset(str(directory), args.dataset_config_name, cache_dir=cache_dir)


def _load_folders(args: DataTrainingArguments, cache_dir: str | None) -> DatasetDict:
    splits = DatasetDict()
    for split, flag, directory in (
        ("train", "--train_dir", args.train_dir),
        ("validation", "--validation_dir", args.validation_dir),
    ):
        if directory is not None:
            _check_image_folder(Path(directory), flag)
            loaded = load_dataset("imagefolder", data_dir=directory, split="train", cache_dir=cache_dir)
            splits[split] = loaded
    return splits


def _check_image_folder(directory: Path, flag: str) -> None:
    if not directory.is_dir():
        raise ValueError(f"{flag} {str(directory)!r} is not a directory.")
    classes = [child for child in directory.rglob("*") if child.is_dir()]
    if not classes:
        raise ValueError(
            f"{flag} {str(directory)!r} has no classes. Expected one folder for each class with its images inside, "
            "such as train/cat/1.jpg and train/dog/2.jpg."
        )


def _standard_columns(dataset: HFDataset, args: DataTrainingArguments) -> HFDataset:
    image = _column(dataset, args.image_column_name, "--image_column_name", Image)
    label = _column(dataset, args.label_column_name, "--label_column_name", ClassLabel)
    dataset = dataset.select_columns([image, label])
    renames = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    dataset = dataset.rename_columns(renames) if renames else dataset
    if not isinstance(dataset.features["label"], ClassLabel):
        dataset = dataset.class_encode_column("label")
    return dataset


def _with_classes_of(training: HFDataset, evaluation: HFDataset) -> HFDataset:
    """`evaluation` with the labels of the classes of `training`: each split numbers those that it has itself."""
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


def _column(dataset: HFDataset, name: str | None, flag: str, kind: type) -> str:
    if name is None:
        typed = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
        guesses = ("image", "img") if kind is Image else ("label", "labels")
        name = typed[0] if typed else next((g for g in guesses if g in dataset.column_names), None)
    if name not in dataset.column_names:
        raise ValueError(
            f"{flag} {name!r}: the dataset has the columns {dataset.column_names}; name the one that holds the "
            f"{'images' if kind is Image else 'labels'}."
        )
    return name


def normalization(processor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that `processor` normalizes with, for values from 0 to 1."""
    if hasattr(processor, "data_config"):  # of a timm model
        return list(processor.data_config["mean"]), list(processor.data_config["std"])
    return list(processor.image_mean), list(processor.image_std)


def transforms(processor, image_size: int, augmentation: str) -> tuple[v2.Transform, v2.Transform]:
    """Training and evaluation transforms from a PIL image to `(3, image_size, image_size)`, normalized alike."""
    mean, std = normalization(processor)
    normalize = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=mean, std=std),
    ]
    resize = [v2.Resize((image_size, image_size))]
    crops = augmentation in ("crop_flip", "rand_augment")
    if crops:
        train = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
        train += [v2.RandAugment()] if augmentation == "rand_augment" else []
    elif augmentation == "pad_crop_flip":
        # An eighth on each side, as the customary 4 of 32 pixels.
        train = [*resize, v2.RandomCrop(image_size, padding=image_size // 8), v2.RandomHorizontalFlip()]
    elif augmentation == "shift":
        train = [*resize, v2.RandomCrop(image_size, padding=1)]
    else:
        train = resize
    evaluation = [v2.Resize(round(image_size / 0.875)), v2.CenterCrop(image_size)] if crops else resize
    return v2.Compose([*train, *normalize]), v2.Compose([*evaluation, *normalize])


class TransformedImages(torch.utils.data.Dataset):
    """A dataset of images with a transform: `{"pixel_values": (3, H, W), "labels": int}`."""

    def __init__(self, dataset: HFDataset, transform: v2.Transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        row = self.dataset[int(index)]
        return {"pixel_values": self.transform(row["image"].convert("RGB")), "labels": row["label"]}

"""Load a saved model, and the images that a command line names as batches for it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion import unpack
from ..conversion.forms import is_packed
from ..export import ENGINES, ExportedClassifier
from ..export.layout import EXPORTED_FILES
from ..installing import how_to_install
from ..outputs import logits_of
from ..progress import with_progress
from ..storage.saved_directory import is_export, load_any_saved, local_directory, saved_processor

NEEDED = ("datasets", "torchvision", "PIL")
"""Modules that reading images takes, and below the one that the handwritten digits come from."""
DIGITS_NEED = "sklearn"


@dataclass(frozen=True)
class Images:
    """Holds batches for a model: dicts with `pixel_values` `(n, 3, H, W)` and `labels` `(n,)`."""

    batches: list[dict[str, Any]]
    where: str

    def __len__(self) -> int:
        return sum(len(batch["labels"]) for batch in self.batches)


def load_model(source: str, args: argparse.Namespace, trainable: bool = False) -> tuple[nn.Module, Any]:
    """Load a saved model, float or quantized, to the device that was asked for, with its image processor.

    Args:
        trainable: Whether the model is to have gradients: packed integers become latent float weights, and all
            values float32. Without it a model computes in the type that it was stored in.

    Raises:
        ValueError: If it is no saved model, has no image processor, or the device is unknown.
    """
    model, processor = load_any_saved(source)
    if trainable:
        # Take the method of torch: transformers refuses its own for quantized models. In bfloat16, which has three
        # digits, small perturbations of weights and the rises of the loss that they cause would be rounded away.
        model = nn.Module.float(unpack(model) if is_packed(model) else model)
    try:
        model = model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device!r}: {error}") from error
    return model, _expected(processor, source)


def load_model_or_graph(source: str, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Load what [`load_model`] does, or an exported graph: if there is nothing else, or if `--engine` names one.

    Raises:
        ValueError: As [`load_model`], or if an engine is named and there is no graph, if no configuration tells the
            classes of the graph, or if another device than the CPU is asked for.
        ImportError: If the engine is not installed; says which extra installs it.
    """
    if args.engine is None and not is_export(local_directory(source)):
        return load_model(source, args)
    if args.device not in (None, "cpu"):
        raise ValueError(f"--device {args.device}: exported graphs run on the CPU; expected cpu, or no --device.")
    model = ExportedClassifier.from_pretrained(source, args.engine or ENGINES[0])
    if model.config is None:
        raise ValueError(
            f"{source}: config.json tells nothing but how the model was exported; expected `id2label`, which says "
            "what its classes are, as in exports of models of transformers."
        )
    # Get no more of a repository than that: beside a graph may lie weights.
    return model, _expected(saved_processor(local_directory(source, files=EXPORTED_FILES)), source)


def _expected(processor: Any, source: str) -> Any:
    if processor is None:
        raise ValueError(
            f"{source} has no image processor (preprocessor_config.json), which says how its images are made. Save "
            "the one of the base model into it: AutoImageProcessor.from_pretrained(...).save_pretrained(...)."
        )
    return processor


def scores_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute logits `(n, classes)` in float32 on the device of the model, of whatever type its weights are.

    Raises:
        ValueError: If the model returns something else: it is no classifier of images.
    """
    scores = logits_of(model(pixel_values=batch["pixel_values"].to(model.device, model.dtype))).float()
    if scores.ndim != 2 or scores.shape[1] != len(model.config.id2label):
        raise ValueError(
            f"{type(model).__name__} returns scores {tuple(scores.shape)} for {len(batch['pixel_values'])} images; "
            f"expected ({len(batch['pixel_values'])}, {len(model.config.id2label)}), one score for each class of its "
            "id2label, as classifiers of images do. Other tasks have other measures, which this command has not."
        )
    return scores


def loss_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean cross-entropy of a batch, a tensor `()`: some classifiers compute no loss of their own."""
    scores = scores_of(model, batch)
    return F.cross_entropy(scores, batch["labels"].to(scores.device))


def load_images(model: nn.Module, processor: Any, args: argparse.Namespace) -> Images:
    """Read and transform the images that the arguments name, as the evaluation of the example script does.

    Raises:
        ImportError: If a library is missing.
        ValueError: If there are no such images, or their classes are not those of the model.
    """
    for name, value in (("--batch-size", args.batch_size), ("--max-samples", args.max_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}; expected 1 or more.")
    is_digits = args.data == "digits"
    missing = [name for name in (*NEEDED, *([DIGITS_NEED] if is_digits else [])) if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} must be installed to read images: {how_to_install('data')}.")
    from ..data import DataTrainingArguments, TransformedImages, input_size, load_split, transforms, without_unreadable

    where = DataTrainingArguments(
        dataset_name=None if is_digits else args.data,
        dataset_config_name=args.dataset_config_name,
        eval_split=args.split,
        max_eval_samples=args.max_samples,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name,
        skip_corrupt=args.skip_corrupt,
        augmentation=args.augmentation or ("none" if is_digits else "crop_flip"),
    )
    try:
        split, found = load_split(where, args.seed)
    except ValueError as error:  # names arguments as the example script calls them
        raise ValueError(str(error).replace("--dataset_name", "--data").replace("--eval_split", "--split")) from error
    if args.skip_corrupt:
        found = without_unreadable(found, split)
    numbers = numbers_of_classes(found.features["label"].names, model, args.data)
    dataset = TransformedImages(found, transforms(processor, input_size(processor), where.augmentation)[1])
    batches = []
    for start in with_progress(range(0, len(dataset), args.batch_size), "reading images"):
        rows = [dataset[k] for k in range(start, min(start + args.batch_size, len(dataset)))]
        labels = torch.tensor([numbers[row["labels"]] for row in rows])
        batches.append({"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels})
    return Images(batches, f"{len(dataset):,} images of {args.data}, split {split}")


def differences_of_processors(first: Any, second: Any) -> list[str]:
    """Say in words what two image processors do differently to an image, as [`load_images`] uses them."""
    from ..data import input_size, normalization

    (mean, std), (other_mean, other_std) = (normalization(each) for each in (first, second))
    found = []
    for what, a, b in (("mean", mean, other_mean), ("standard deviation", std, other_std)):
        if len(a) != len(b) or not all(map(math.isclose, a, b)):
            found.append(f"{what} of each channel {a} and {b}")
    sizes = [input_size(each) for each in (first, second)]
    if sizes[0] != sizes[1]:
        found.append(f"size in pixels {sizes[0]} and {sizes[1]}")
    orders = ["BGR" if getattr(each, "do_flip_channel_order", False) else "RGB" for each in (first, second)]
    if orders[0] != orders[1]:
        found.append(f"order of channels {orders[0]} and {orders[1]}")
    return found


def numbers_of_classes(names: Sequence[str], model: Any, data: str) -> list[int]:
    """Return the number that each class of the data has in the model.

    By name; a model whose classes have no names of their own (`LABEL_0`, ...) has them in the order of the data.

    Raises:
        ValueError: If the model lacks a class of the data, has two of its name, or does not number its classes from
            0 on.
    """
    stored = getattr(model.config, "id2label", {})
    numbers = sorted(map(int, stored))
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"The model's config.json numbers its {len(numbers)} classes {', '.join(map(str, numbers[:10]))}"
            f"{', ...' if len(numbers) > 10 else ''} in id2label; expected 0 to {len(numbers) - 1}, the places of its "
            "scores. Number them as they were in training, in id2label and label2id."
        )
    known = {str(name): int(number) for number, name in stored.items()}
    unnamed = all(name.startswith("LABEL_") for name in known)
    if unnamed and len(known) == len(names):
        return list(range(len(names)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"--data {data}: {len(unknown)} of its {len(names)} classes are none of the model's, such as "
            f"{unknown[0]!r}; the model has {len(known)}: {list(known)[:3]}... Give data with the classes that "
            "it was trained on."
        )
    called = [str(name) for name in stored.values()]
    if twice := [name for name in names if called.count(name) > 1]:
        raise ValueError(
            f"--data {data}: {called.count(twice[0])} classes of the model are called {twice[0]!r}, so that it is not "
            "known which one the data means. Give the classes names of their own, in id2label and label2id."
        )
    return [known[name] for name in names]

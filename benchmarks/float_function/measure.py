"""How much of a float MobileNetV2's function survives conversion, and what training brings back at 4 bits.

    python -m benchmarks.float_function.measure     # what `make float-function` runs; goes on where it was interrupted

Top-1 agreement of the quantized model with the float model on test images of Oxford Flowers-102: with the ImageNet
classes of the checkpoint right after conversion and calibration on two batches, and with the classes of the flowers at
4 bits before and after training. Writes docs/float_function.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from examples.image_model import has_folded_batch_norm, refit_batch_norm
from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, correct_biases, quantize
from hf_saq.data import DataTrainingArguments, TransformedImages, load_images, transforms
from hf_saq.training.parameter_groups import parameter_groups

from ..shared.command_line import parsed
from ..shared.places import FLOWERS, MOBILENET, RESULTS
from ..shared.runs import Runs
from ..shared.schedule_variants import saq_config
from ..shared.training_loop import take_steps
from .conversions import CALIBRATION_BATCHES, CONVERSIONS, MODULE, RHO, file_name
from .page import page


@dataclass
class FunctionArguments:
    """What to measure. Anything but the paths is stored with each result."""

    data: str = field(default=FLOWERS, metadata={"help": "Flowers-102 as parquet files."})
    weights: str = field(default=MOBILENET, metadata={"help": "Directory of the float MobileNetV2."})
    results: str = field(default=f"{RESULTS}/float_function", metadata={"help": "Where the JSON results go."})
    document: str = field(default="docs/float_function.md", metadata={"help": "The page to write."})
    image_size: int = field(default=224, metadata={"help": "Pixels, for the figures right after conversion."})
    images: int = field(default=300, metadata={"help": "How many test images."})
    batch: int = field(default=32, metadata={"help": "Images of a batch; two batches calibrate."})
    small_image_size: int = field(default=64, metadata={"help": "Pixels, for the run with training."})
    float_epochs: int = field(default=6, metadata={"help": "Of fine-tuning the float model to the flowers."})
    epochs: int = field(default=4, metadata={"help": "Of training at 4 bits."})
    learning_rate: float = field(default=1e-3, metadata={"help": "AdamW, cosine to zero."})
    seed: int = field(default=0, metadata={"help": "Of images, their order and augmentation."})


class Normalization:
    """What the checkpoint was trained with."""

    image_mean = image_std = (0.5, 0.5, 0.5)


def datasets(args: FunctionArguments, size: int) -> tuple[TransformedImages, Tensor, Tensor, Tensor]:
    """Training images with augmentation; images `(n, 3, size, size)` to calibrate with and to score; their labels."""
    splits = load_images(
        DataTrainingArguments(dataset_name=args.data, eval_split="test", max_eval_samples=args.images), args.seed
    )
    augmented, plain = transforms(Normalization, size, "crop_flip")
    train = splits["train"].shuffle(seed=args.seed)
    few = TransformedImages(train.select(range(CALIBRATION_BATCHES * args.batch)), plain)
    calibration = torch.stack([few[i]["pixel_values"] for i in range(len(few))])
    test = splits["eval"].shuffle(seed=args.seed)
    scored = TransformedImages(test.select(range(min(args.images, len(test)))), plain)
    rows = [scored[i] for i in range(len(scored))]  # decoded once
    return (
        TransformedImages(train, augmented),
        calibration,
        torch.stack([row["pixel_values"] for row in rows]),
        torch.tensor([row["labels"] for row in rows]),
    )


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    """Classes, `(n,)`."""
    model.eval()
    return torch.cat([model(pixel_values=part).logits.argmax(dim=1) for part in images.split(batch)])


def agreement(a: Tensor, b: Tensor) -> float:
    return round(100 * (a == b).double().mean().item(), 2)


class Conversion:
    """Agreement right after conversion; images and the float model's classes are made once."""

    def __init__(self, args: FunctionArguments):
        self.batch = args.batch
        _, self.calibration, self.images, _ = datasets(args, args.image_size)
        self.model = AutoModelForImageClassification.from_pretrained(args.weights)
        self.expected = predictions(self.model, self.images, args.batch)

    def measure(self, fields: dict[str, Any]) -> dict[str, float]:
        quantized = quantize(copy.deepcopy(self.model), SAQQuantizationConfig(**fields))
        batches = list(self.calibration.split(self.batch))
        calibrate(quantized, batches)
        plain = agreement(predictions(quantized, self.images, self.batch), self.expected)
        correct_biases(quantized, batches)
        corrected = agreement(predictions(quantized, self.images, self.batch), self.expected)
        return {"agreement": plain, "agreement with correct_biases": corrected}


def train(
    model: nn.Module, images: torch.utils.data.Dataset, args: FunctionArguments, epochs: int, saq: SAQConfig
) -> None:
    """AdamW with a cosine; SAQ's second pass if `saq` has a case."""
    torch.manual_seed(args.seed)
    loader = torch.utils.data.DataLoader(images, batch_size=args.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.learning_rate))
    batches = (batch for _ in range(epochs) for batch in loader)
    take_steps(model, batches, epochs * len(loader), optimizer, saq, lambda m, batch: m(**batch).loss)


def training(args: FunctionArguments) -> dict[str, Any]:
    """Agreement and accuracy at W4A4 before and after training, on a float model adapted to the flowers first."""
    images, calibration, test, labels = datasets(args, args.small_image_size)
    classes = images.dataset.features["label"].num_classes
    torch.manual_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(
        args.weights, num_labels=classes, ignore_mismatched_sizes=True, classifier_dropout_prob=0.2
    )
    batches = list(calibration.split(args.batch))
    if has_folded_batch_norm(model):
        refit_batch_norm(model, batches)
    train(model, images, args, args.float_epochs, SAQConfig(case=None))
    expected = predictions(model, test, args.batch)
    outcome: dict[str, Any] = {"float top-1": agreement(expected, labels)}
    for method, config in {"QAT": SAQConfig(case=None), "SAQ": saq_config(RHO, {})}.items():
        quantized = quantize(copy.deepcopy(model), SAQQuantizationConfig(**CONVERSIONS["W4A4 per channel"]))
        calibrate(quantized, batches)
        before = predictions(quantized, test, args.batch)
        train(quantized, images, args, args.epochs, config)
        after = predictions(quantized, test, args.batch)
        for moment, found in (("before", before), ("after", after)):
            outcome[f"{method} {moment}"] = [agreement(found, expected), agreement(found, labels)]
        print(method, outcome[f"{method} before"], outcome[f"{method} after"], flush=True)
    return outcome


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(FunctionArguments, argv, MODULE, __doc__)
    for path in (args.data, args.weights):
        if not Path(path).is_dir():
            raise SystemExit(f"{path} is not a directory; name the data with --data and the model with --weights.")
    stored = {k: v for k, v in vars(args).items() if k not in ("data", "weights", "results", "document")}
    runs = Runs(Path(args.results), command)
    conversion = cache(lambda: Conversion(args))
    for name, fields in CONVERSIONS.items():
        runs.once(file_name(name), {**stored, "config": fields}, partial(lambda f: conversion().measure(f), fields))
    runs.once("training", stored, lambda: training(args))
    Path(args.document).write_text(page(Path(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()

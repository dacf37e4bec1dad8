"""Evaluate an exported model on the engine that is to run it."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from hf_saq.data import TopKAccuracy
from hf_saq.export import ENGINES, ExportedClassifier, check_can_export

NOT_ASKED = "none"
CHOICES = (NOT_ASKED, *ENGINES)


def check_engine_choice(engine: str) -> None:
    """Raise `ValueError` if there is no such engine, or if what exporting to it needs is not installed."""
    if engine not in CHOICES:
        raise ValueError(f"--engine {engine!r}; expected one of {list(CHOICES)}.")
    if engine == NOT_ASKED:
        return
    try:
        check_can_export(engine)
    except ImportError as error:
        raise ValueError(f"--engine {engine}: {error}") from error


def evaluate_exported(directory: Path, engine: str, images: Dataset, batch_size: int, workers: int) -> float:
    """Top-1 accuracy of the export in `directory` on `images`, 0 to 1."""
    model = ExportedClassifier.from_pretrained(directory, engine=engine)
    metric = TopKAccuracy(keep_in_memory=True)
    for batch in DataLoader(images, batch_size=batch_size, num_workers=workers):
        metric.add_batch(predictions=model(pixel_values=batch["pixel_values"]).logits, references=batch["labels"])
    return metric.compute()["top1"]

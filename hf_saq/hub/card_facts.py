"""Collect what a model card may say.

What is not known is left out, and no number is made up: each one comes from a measurement of the run that the card
describes, or from the files that are published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import SAQQuantizationConfig
from ..conversion.report import LayerPlan
from ..export.report import ExportReport
from ..storage.inspection_report import StoredModel

NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "step", "model_preparation_time")
"""Entries that `Trainer.evaluate` returns besides its metrics."""


@dataclass(frozen=True)
class ResultRow:
    """Holds one line of the table of results: a model that the same run evaluated.

    Args:
        method: For example "float", "QAT" or "SAQ".
        bits: For example "W4A4".
        metrics: What `evaluate` returned; a prefix `eval_` and timings are dropped.
        weight_bytes: Measured size of its weight files in bytes.
    """

    method: str
    bits: str
    metrics: Mapping[str, float]
    weight_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Holds what is known of a model that is about to be published.

    Attributes:
        name: Title of the card.
        load_from: What `from_pretrained` takes: the name of a repository, or a directory. `None` leaves the loading
            snippet out.
        architecture: Name of the model's class.
        config: How it is quantized.
        layers: The plan of every layer, as in the report of `quantize`.
        revision: Branch it is published on, if not the main one.
        has_processor: Whether an image processor is stored with it, so that a pipeline can be made.
        weight_bytes: Measured size of the weight files that are published, in bytes.
        metrics: Metrics measured on exactly the weights that are published, names as in [`ResultRow`].
        comparison: Rows of other models that the same run measured.
        method: How it was trained, in words; the first word is its row in the table of results.
        bit_operations: Bit operations for one image, as [`hf_saq.cost`] counts them.
        sharpness: Pairs of step and logged value.
        hyperparameters: Name -> value.
        has_picture: Whether [`draw_training_curve`] drew a picture that is published too.
        export: What is known of the integer graph that lies beside the model, if there is one.
        base_model, datasets, dataset_name, license, language, tags: As in the Hub's metadata.
    """

    name: str
    architecture: str
    config: SAQQuantizationConfig | None
    load_from: str | None = None
    revision: str | None = None
    layers: Sequence[LayerPlan] = ()
    has_processor: bool = False
    weight_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    comparison: Sequence[ResultRow] = ()
    method: str | None = None
    bit_operations: int | None = None
    sharpness: Sequence[tuple[int, float]] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    has_picture: bool = False
    export: ExportReport | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    dataset_name: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Pick what was measured from what `evaluate` returned: finite numbers, without the prefix `eval_`, loss last."""
    found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    found = dict(sorted(found.items(), key=lambda item: item[0] == "loss"))
    return {
        name: float(value)
        for name, value in found.items()
        if name not in NO_METRICS
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def facts_of_files(found: StoredModel, load_from: str) -> CardFacts:
    """Collect what the files of a saved model tell. They tell nothing of how it was trained or how good it is."""
    return CardFacts(
        name=load_from.split("/")[-1],
        load_from=load_from,
        architecture=found.architecture,
        config=found.quantization,
        layers=found.plans,
        has_processor=found.has_processor,
        weight_bytes=found.weight_bytes,
    )

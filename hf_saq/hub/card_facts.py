"""Collect what a model card may say.

What is not known is left out, and no number is made up: each one comes from a measurement of the run that the card
describes, or from the files that are published.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from ..config import SAQQuantizationConfig
from ..conversion.report import LayerPlan
from ..export.report import ExportReport
from ..storage.inspection_report import StoredModel
from ..storage.saved_directory import named_model_class

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
"""Entries of `Trainer.evaluate` besides metrics; of several data sets, the name of each stands before them."""
NO_METRICS = (*TIMINGS, "samples", "epoch", "step")
"""Entries that `Trainer.evaluate` returns, or `save_metrics` stores, besides metrics."""
_TIMINGS_OF_A_DATA_SET = tuple(f"_{name}" for name in TIMINGS)
RESULTS = "eval_results.json"
"""What `Trainer.save_metrics("eval", metrics)` writes beside a model."""
TASK = "image-classification"
"""What models do of classes that are not those of transformers; its own are listed under their tasks."""
OTHER_TASKS = {
    "image-segmentation": (
        "FOR_SEMANTIC_SEGMENTATION",
        "FOR_INSTANCE_SEGMENTATION",
        "FOR_UNIVERSAL_SEGMENTATION",
        "FOR_IMAGE_SEGMENTATION",
    ),
    "object-detection": ("FOR_OBJECT_DETECTION",),
    "depth-estimation": ("FOR_DEPTH_ESTIMATION",),
    "image-to-image": ("FOR_IMAGE_TO_IMAGE",),
    "keypoint-detection": ("FOR_KEYPOINT_DETECTION", "FOR_POSE_ESTIMATION"),
    "video-classification": ("FOR_VIDEO_CLASSIFICATION",),
    "mask-generation": ("FOR_MASK_GENERATION",),
    "image-text-to-text": ("FOR_IMAGE_TEXT_TO_TEXT",),
    "zero-shot-image-classification": ("FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "zero-shot-object-detection": ("FOR_ZERO_SHOT_OBJECT_DETECTION",),
    "image-feature-extraction": ("FOR_IMAGE",),
}
"""Name of a task on the Hub -> lists of classes for it in transformers (`MODEL_..._MAPPING_NAMES`)."""
LANDSCAPE = "landscape.png"
"""A picture of the loss around the weights, if somebody put one beside a model: `landscape(...).plot(file)`."""


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
        float_weight_bytes: Bytes of all parameters in float32.
        bit_operations: Bit operations for one image, as [`hf_saq.cost`] counts them.
        float_bit_operations: Those of the same model in float32.
        evaluated_images: Number of images that `metrics` were measured on.
        measured_where: Where `metrics` come from, in words.
        sharpness: Pairs of step and logged value.
        hyperparameters: Name -> value.
        labels: Names of the classes, in their order.
        has_picture: Whether [`draw_training_curve`] drew a picture that is published too.
        has_landscape: Whether there is a picture of the loss around the weights.
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
    float_weight_bytes: int | None = None
    bit_operations: int | None = None
    float_bit_operations: int | None = None
    evaluated_images: int | None = None
    measured_where: str = "in the training run, on its evaluation data"
    sharpness: Sequence[tuple[int, float]] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] = ()
    has_picture: bool = False
    has_landscape: bool = False
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
        and not name.endswith(_TIMINGS_OF_A_DATA_SET)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def facts_of_files(found: StoredModel, load_from: str, directory: Path) -> CardFacts:
    """Collect what the files of a saved model tell, and the results that were stored beside them.

    Raises:
        ValueError: If the file of results is not one that `Trainer.save_metrics` wrote.
    """
    results = _stored_results(directory / RESULTS)
    samples = results.get("eval_samples")
    return CardFacts(
        name=load_from.split("/")[-1],
        load_from=load_from,
        architecture=found.architecture,
        config=found.quantization,
        layers=found.plans,
        has_processor=found.has_processor,
        weight_bytes=found.weight_bytes,
        float_weight_bytes=4 * found.parameters,
        metrics={name: value for name, value in results.items() if name.startswith("eval_")},
        evaluated_images=samples if isinstance(samples, int) else None,
        measured_where=f"by whoever wrote {RESULTS} beside the weights",
        labels=names_of_classes(found.labels),
        has_landscape=(directory / LANDSCAPE).is_file(),
    )


def task_of(architecture: str) -> str | None:
    """Return the Hub's name of the task of a model class, by its name; `None` where the Hub has none for it, as for
    backbones and for training on masked images."""
    for task, lists in {TASK: ("FOR_IMAGE_CLASSIFICATION",), **OTHER_TASKS}.items():
        for name in lists:
            listed = getattr(modeling_auto, f"MODEL_{name}_MAPPING_NAMES", {}).values()
            if any(architecture in (each if isinstance(each, (tuple, list)) else (each,)) for each in listed):
                return task
    return TASK if named_model_class(architecture) is None else None


def in_order(id2label: Mapping[Any, Any] | None) -> list[Any]:
    """List the names of classes by their numbers, which may be written as text: "10" comes after "9"."""
    numbers = {int(number) if str(number).isdigit() else number: name for number, name in (id2label or {}).items()}
    return [name for _, name in sorted(numbers.items(), key=lambda pair: (not isinstance(pair[0], int), pair[0]))]


def names_of_classes(labels: Sequence[Any]) -> Sequence[str]:
    """Return the names of classes as text, also of numbers; none if they are those that transformers makes up."""
    labels = [str(label) for label in labels]
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


def _stored_results(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Remove it, or write it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}; expected an object of metrics. Remove it.")
    return found

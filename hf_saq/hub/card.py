"""The model card of a quantized model: facts in, `huggingface_hub.ModelCard` out.

Whatever is not known is left out. No number is made up here: each one comes from a measurement of the run that is
described, or from the files that are published.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import SAQQuantizationConfig
from ..conversion.report import LayerPlan
from ..version import __version__

PICTURE = "training_curve.png"
TASK = "image-classification"

METRIC_NAMES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}
"""How a card calls what `evaluate` calls by a short name. Any other metric keeps its own."""

METRIC_TYPES = {"top1": "accuracy", "top5": "accuracy"}
"""Identifiers that the Hub knows."""

NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "step", "model_preparation_time")
"""What `Trainer.evaluate` returns besides what it measured."""


@dataclass(frozen=True)
class ResultRow:
    """One line of the table of results: a model that this very run evaluated.

    Args:
        method: For example "float", "QAT" or "SAQ".
        bits: For example "W4A4".
        metrics: What `evaluate` returned; a prefix `eval_` and timings are dropped.
        weight_bytes: Size of its weight files, measured.
    """

    method: str
    bits: str
    metrics: Mapping[str, float]
    weight_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known of a model that is about to be published.

    Attributes:
        name: Title of the card.
        load_from: What `from_pretrained` takes: the name of a repository, or a directory. `None`: no loading snippet.
        architecture: Name of the model's class.
        config: How it is quantized.
        layers: The plan of every layer, as in the report of `quantize`.
        revision: Branch it is published on, if not the main one.
        has_processor: Whether an image processor is stored with it, so that a pipeline can be made.
        weight_bytes: Size of the weight files that are published, measured.
        metrics: Measured on the very weights that are published, names as in [`ResultRow`].
        comparison: Rows of other models that the same run measured.
        method: How it was trained, in words; the first word is its row in the table of results.
        bit_operations: For one image, as [`hf_saq.cost`] counts them.
        sharpness: Pairs of step and logged value.
        hyperparameters: Name -> value.
        has_picture: Whether [`training_curve`] drew a picture that is published too.
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
    base_model: str | None = None
    datasets: Sequence[str] = ()
    dataset_name: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among what `evaluate` returned that were measured, without the prefix `eval_`; loss last."""
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


def model_card(facts: CardFacts) -> ModelCard:
    """The card: metadata of the Hub and the text."""
    metrics = measured(facts.metrics)
    data = ModelCardData(
        model_name=facts.name if metrics else None,  # of the results; the Hub knows the repository's
        library_name="transformers",
        pipeline_tag=TASK,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        license=facts.license,
        language=[facts.language] if isinstance(facts.language, str) else list(facts.language or []) or None,
        tags=list(dict.fromkeys([*(facts.config.tags if facts.config is not None else ()), *facts.tags])),
        metrics=list(dict.fromkeys(METRIC_TYPES.get(name, name) for name in metrics)) or None,
        eval_results=[_eval_result(facts, name, value) for name, value in metrics.items()] or None,
    )
    sections = (
        _introduction(facts),
        _loading(facts),
        _results(facts, metrics),
        _quantization(facts),
        _training(facts),
    )
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _eval_result(facts: CardFacts, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        # The Hub asks for both. What is not known is called so.
        dataset_type=facts.datasets[0] if facts.datasets else "unknown",
        dataset_name=facts.dataset_name or (facts.datasets[0] if facts.datasets else "unknown"),
        metric_type=METRIC_TYPES.get(name, name),
        metric_name=METRIC_NAMES.get(name, name),
        metric_value=value,
    )


def _introduction(facts: CardFacts) -> str:
    config = facts.config
    sentence = f"`{facts.architecture}`"
    if config is not None:
        scales = "one scale per output channel" if config.weight_granularity == "channel" else "one scale per tensor"
        sentence += f" with {bits_name(config)} quantization ({config.quantizer}, {scales})"
    if facts.method is not None:
        sentence += f", trained with {facts.method}"
    if facts.base_model is not None:
        sentence += f", from [{facts.base_model}](https://huggingface.co/{facts.base_model})"
    if facts.dataset_name or facts.datasets:
        sentence += f", on {facts.dataset_name or ', '.join(facts.datasets)}"
    if config is not None and config.storage == "packed":
        sentence += ". Its weights are stored as packed integers"
    return f"# {facts.name}\n\n{sentence}. Made with hf_saq {__version__}."


def _loading(facts: CardFacts) -> str:
    if facts.load_from is None:
        return ""
    where = f'"{facts.load_from}"' + (f', revision="{facts.revision}"' if facts.revision is not None else "")
    lines = ["import hf_saq  # pip install hf-saq; makes transformers know the format"]
    if facts.has_processor:
        lines += [
            "from transformers import pipeline",
            "",
            f'classify = pipeline("{TASK}", model={where})',
            'print(classify("image.png"))',
        ]
    else:
        lines += [
            "from transformers import AutoModelForImageClassification",
            "",
            f"model = AutoModelForImageClassification.from_pretrained({where})",
        ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _results(facts: CardFacts, metrics: Mapping[str, float]) -> str:
    rows = [ResultRow(r.method, r.bits, measured(r.metrics), r.weight_bytes) for r in facts.comparison]
    if metrics:
        bits = bits_name(facts.config) if facts.config is not None else ""
        rows.append(
            ResultRow(f"**{(facts.method or 'this model').split(' (')[0]}**", bits, metrics, facts.weight_bytes)
        )
    rows = [row for row in rows if row.metrics]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    head = ["method", "bits", *(METRIC_NAMES.get(name, name) for name in names), "weights on disk"]
    cells = [
        [
            row.method,
            row.bits,
            *(f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in names),
            "" if row.weight_bytes is None else kibibytes(row.weight_bytes),
        ]
        for row in rows
    ]
    table = _table(head, cells)
    return f"## Results\n\nMeasured in the training run, on its evaluation data.\n\n{table}"


def _quantization(facts: CardFacts) -> str:
    known = []
    if facts.layers:
        counts = Counter(
            (_bits(layer, "weight_bits"), _bits(layer, "activation_bits"), layer.reason if not layer.settings else "")
            for layer in facts.layers
        )
        cells = [[weight, activation, str(n), reason] for (weight, activation, reason), n in counts.items()]
        known.append(_table(["weight bits", "activation bits", "layers", "left in float because"], cells))
    lines = []
    if facts.weight_bytes is not None:
        lines.append(f"- weights on disk: {kibibytes(facts.weight_bytes)}")
    if facts.bit_operations is not None:
        lines.append(
            f"- bit operations for one image (multiply-accumulates x weight bits x activation bits): "
            f"{facts.bit_operations:,}"
        )
    if lines:
        known.append("\n".join(lines))
    return "## Quantization\n\n" + "\n\n".join(known) if known else ""


def _training(facts: CardFacts) -> str:
    known = []
    if facts.has_picture:
        known.append(f"![Loss and metrics over training]({PICTURE})")
    if facts.sharpness:
        logged = [f"{value:.4g} at step {step}" for step, value in (facts.sharpness[0], facts.sharpness[-1])]
        known.append(
            "Sharpness (loss at the perturbed minus loss at the quantized weights, mean since the log before): "
            + (f"{logged[0]}." if len(facts.sharpness) == 1 else f"first {logged[0]}, last {logged[1]}.")
        )
    if facts.hyperparameters:
        known.append(
            "\n".join(f"- {name}: {' '.join(str(value).split())}" for name, value in facts.hyperparameters.items())
        )
    return "## Training\n\n" + "\n\n".join(known) if known else ""


def bits_name(config: SAQQuantizationConfig) -> str:
    """W4A4; 32 stands for float."""
    return f"W{config.weight_bits or 32}A{config.activation_bits or 32}"


def kibibytes(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"


def weight_file_bytes(directory: str | Path) -> int | None:
    """Size of the weight files in a saved model, in bytes, or `None` if there are none."""
    sizes = [file.stat().st_size for file in Path(directory).glob("*.safetensors")]
    return sum(sizes) if sizes else None


def has_processor(directory: str | Path) -> bool:
    """Whether a saved model has an image processor next to it."""
    return any((Path(directory) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def _bits(layer: LayerPlan, key: str) -> str:
    if layer.settings and key not in layer.settings:
        return "-"  # the products of an attention have no weight
    return str(layer.settings.get(key) or "float")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, less the columns that have no entry."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [
        [head[i] for i in used],
        ["---"] * len(used),
        *([row[i].replace("|", "\\|") for i in used] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

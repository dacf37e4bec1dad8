"""Turn facts into a model card (`huggingface_hub.ModelCard`). What is not among the facts is not in the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..conversion.report import LayerPlan
from ..installing import how_to_install
from ..storage.inspection import inspect_checkpoint
from ..tables import bits_name, kibibytes, markdown_table
from ..version import __version__
from .card_export import integer_inference
from .card_facts import LANDSCAPE, TASK, CardFacts, ResultRow, facts_of_files, measured, task_of
from .card_sections import closing_sections, folded
from .layer_bits import layer_bits

CARD = "README.md"
PICTURE = "training_curve.png"
ONE_IMAGE_IN = ("image-segmentation", "object-detection", "depth-estimation", "image-feature-extraction")
"""Tasks whose pipelines take an image and nothing else, as that of classification does."""

METRIC_NAMES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}
"""Short name that `evaluate` uses -> name in a card. Any other metric keeps its name."""

METRIC_TYPES = {"top1": "accuracy", "top5": "accuracy"}
"""Short name that `evaluate` uses -> identifier that the Hub knows."""


def model_card(facts: CardFacts) -> ModelCard:
    """Make the card of these facts: the metadata for the Hub and the text. Nothing is written to disk."""
    metrics = measured(facts.metrics)
    data = ModelCardData(
        model_name=facts.name if metrics else None,  # names the results; the Hub knows the repository's name
        library_name="transformers",
        pipeline_tag=task_of(facts.architecture),
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        license=facts.license,
        language=[facts.language] if isinstance(facts.language, str) else list(facts.language or []) or None,
        tags=list(dict.fromkeys([*(facts.config.tags if facts.config is not None else ()), *facts.tags])),
        metrics=list(dict.fromkeys(METRIC_TYPES.get(name, name) for name in metrics)) or None,
        eval_results=[_eval_result(facts, name, value) for name, value in metrics.items()] or None,
    )
    is_classifier = task_of(facts.architecture) == TASK
    sections = (
        _introduction(facts),
        _loading(facts),
        _results(facts, metrics),
        _quantization(facts),
        integer_inference(facts.export, facts.load_from, facts.revision, facts.has_processor and is_classifier),
        _training(facts),
        *(closing_sections(facts) if facts.config is not None else ()),
    )
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_card(directory: str | Path, load_from: str | None = None, overwrite: bool = False) -> Path:
    """Write the `README.md` of a saved model from its files.

    How good it is is told by an `eval_results.json` beside them, as `Trainer.save_metrics` writes it, or not at all.

    Args:
        directory: The saved model.
        load_from: Name in the loading snippet: the repository the model will be in. Default: the directory's name.
        overwrite: Whether to replace a card that is there.

    Returns:
        Path of the card.

    Raises:
        ValueError: If there is a card already and `overwrite` is not set, or if there is no model of hf_saq.
    """
    card = Path(directory) / CARD
    if card.exists() and not overwrite:
        raise ValueError(
            f"{card} exists; it may hold what was measured in training. Replace it with overwrite (--force)."
        )
    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is not a directory; expected that of a saved model.")
    found = inspect_checkpoint(str(directory))
    name = load_from or Path(directory).absolute().name
    model_card(facts_of_files(found, name, Path(directory))).save(card)
    return card


def _eval_result(facts: CardFacts, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task_of(facts.architecture) or "other",  # the Hub asks for one
        # Give both, because the Hub asks for them, and call what is not known "unknown".
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
        bits = bits_name(config.weight_bits, config.activation_bits)
        sentence += f" with {bits} quantization ({config.quantizer}, {scales})"
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
    lines = [f"# {how_to_install()}", "import hf_saq  # makes transformers know the format"]
    task = task_of(facts.architecture)
    if facts.has_processor and task in (TASK, *ONE_IMAGE_IN):
        run = "classify" if task == TASK else "run"
        lines += [
            "from transformers import pipeline",
            "",
            f'{run} = pipeline("{task}", model={where})',
            f'print({run}("image.png"))',
        ]
    else:
        kind = "AutoModelForImageClassification" if task == TASK else facts.architecture
        lines += [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({where})"]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _results(facts: CardFacts, metrics: Mapping[str, float]) -> str:
    rows = [ResultRow(r.method, r.bits, measured(r.metrics), r.weight_bytes) for r in facts.comparison]
    if metrics:
        config = facts.config
        bits = bits_name(config.weight_bits, config.activation_bits) if config is not None else ""
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
    table = markdown_table(head, cells)
    count = "" if facts.evaluated_images is None else f" ({facts.evaluated_images:,} images)"
    return f"## Results\n\nMeasured {facts.measured_where}{count}.\n\n{table}"


def _quantization(facts: CardFacts) -> str:
    known = []
    if facts.layers:
        counts = Counter(
            (_bits(layer, "weight_bits"), _bits(layer, "activation_bits"), layer.reason if not layer.settings else "")
            for layer in facts.layers
        )
        cells = [[weight, activation, str(n), reason] for (weight, activation, reason), n in counts.items()]
        known.append(markdown_table(["weight bits", "activation bits", "layers", "left in float because"], cells))
        known += filter(None, [layer_bits(facts.config, facts.layers)])
    rows = []
    if facts.weight_bytes is not None:
        rows.append(("weights on disk", kibibytes, facts.float_weight_bytes, facts.weight_bytes))
    if facts.bit_operations is not None:
        rows.append(("bit operations for one image", "{:,}".format, facts.float_bit_operations, facts.bit_operations))
    cells = [
        [
            name,
            "" if before is None else show(before),
            show(now),
            "" if before is None else f"{before / now:.1f} x less",
        ]
        for name, show, before, now in rows
    ]
    if cells:
        known.append(markdown_table(["", "float32", "this model", "ratio"], cells))
    if facts.bit_operations is not None:
        known.append("Bit operations are multiply-accumulates x weight bits x activation bits.")
    return "## Quantization\n\n" + "\n\n".join(known) if known else ""


def _training(facts: CardFacts) -> str:
    known = []
    if facts.has_picture:
        known.append(f"![Loss and metrics over training]({PICTURE})")
    if facts.has_landscape:
        known.append(f"![Loss around the weights]({LANDSCAPE})")
    if facts.sharpness:
        logged = [f"{value:.4g} at step {step}" for step, value in (facts.sharpness[0], facts.sharpness[-1])]
        known.append(
            "Sharpness (loss at the perturbed minus loss at the quantized weights): "
            + (f"{logged[0]}." if len(facts.sharpness) == 1 else f"first {logged[0]}, last {logged[1]}.")
        )
    if facts.hyperparameters:
        lines = [f"- {name}: {' '.join(str(value).split())}" for name, value in facts.hyperparameters.items()]
        known.append(folded("Hyperparameters", "\n".join(lines)))
    return "## Training\n\n" + "\n\n".join(known) if known else ""


def _bits(layer: LayerPlan, key: str) -> str:
    if layer.settings and key not in layer.settings:
        return "-"  # the products of an attention have no weight
    return str(layer.settings.get(key) or "float")

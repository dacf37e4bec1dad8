"""Collect what a model card may say about a training run, from the `Trainer` that ran it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import TrainingSummary

from ..config import SAQConfig, SAQQuantizationConfig
from ..conversion import float_parameters
from ..conversion.report import ConversionReport
from ..layers import QuantizedLayer
from ..storage.saved_directory import has_processor
from ..storage.weight_files import weight_file_bytes
from .card_facts import LANDSCAPE, CardFacts, ResultRow, in_order, names_of_classes

DATASET_LOADERS = {"imagefolder", "webdataset", "generator", "arrow", "csv", "json", "pandas", "parquet", "text"}
"""Builders of `datasets` that read files of the user: their names are not names of datasets on the Hub."""


def facts_of_run(
    trainer: Trainer,
    saq_config: SAQConfig,
    metrics: Mapping[str, float],
    directory: Path,
    has_picture: bool,
    comparison: Sequence[ResultRow] = (),
    evaluated_images: int | None = None,
    **given: Any,
) -> CardFacts:
    """Collect what a run knows about the model it trained.

    Args:
        metrics: Metrics measured on the present weights.
        directory: Directory where the model is saved; sizes are those of its files.
        has_picture: Whether there is a picture of the training.
        comparison: Rows of other models that the same run measured.
        evaluated_images: Number of images behind `metrics`.
        **given: Arguments of the user, as in [`transformers.Trainer.create_model_card`].
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    repository = trainer.hub_model_id or trainer.args.hub_model_id
    own_name = directory.absolute().name
    about: dict[str, Any] = {"config": None, "hyperparameters": hyperparameters_of_run(trainer, saq_config)}
    if isinstance(model, PreTrainedModel):
        about |= _of_transformers(trainer, model, about["hyperparameters"], given)
        about["load_from"] = repository or own_name
    report = getattr(model, "quantization_report", None)
    logs = trainer.state.log_history
    return CardFacts(
        **about,
        name=given.get("model_name") or (repository or own_name).split("/")[-1],
        revision=trainer.args.hub_revision,
        architecture=type(model).__name__,
        layers=report.layers if isinstance(report, ConversionReport) else (),
        has_processor=has_processor(directory),
        weight_bytes=weight_file_bytes(directory),
        metrics=metrics,
        comparison=comparison,
        method=_method(trainer, saq_config),
        float_weight_bytes=4 * float_parameters(model),
        bit_operations=_cost(trainer, "bit_operations"),
        float_bit_operations=_cost(trainer, "float_bit_operations"),
        evaluated_images=evaluated_images,
        labels=names_of_classes(in_order(getattr(model.config, "id2label", None)))
        if isinstance(model, PreTrainedModel)
        else (),
        sharpness=_points(logs, "measured_sharpness") or _points(logs, "sharpness"),
        has_picture=has_picture,
        has_landscape=(directory / LANDSCAPE).is_file(),
        export=getattr(trainer, "exported", None),
    )


def on_the_hub(name: str | None) -> str | None:
    """Return `name` if it can be the name of a repository: not empty, no path that exists here, and well-formed."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _of_transformers(
    trainer: Trainer, model: PreTrainedModel, hyperparameters: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect what transformers' own summary of a run knows, and how the model is quantized now."""
    # Pass an empty name where there is none: otherwise the summary takes a directory for a model on the Hub.
    base_model = on_the_hub(given.get("finetuned_from") or model.config._name_or_path) or ""
    summary = TrainingSummary.from_trainer(trainer, **{**given, "finetuned_from": base_model})
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, SAQQuantizationConfig):
        config = config.replace(storage="packed" if _will_be_packed(model) else "float")
    else:
        config = None
    return {
        "config": config,
        "base_model": summary.finetuned_from or None,
        "datasets": [t for t in _listed(summary.dataset_tags) if t not in DATASET_LOADERS and on_the_hub(t)],
        "dataset_name": ", ".join(_listed(given.get("dataset"))) or None,
        "license": summary.license,
        "language": summary.language,
        "tags": [*_listed(summary.tags), *(model.model_tags or [])],
        "hyperparameters": {**(summary.hyperparameters or {}), **hyperparameters},
    }


def _cost(trainer: Any, name: str) -> int | None:
    """Take what calibration counted from the log, or from the trainer where no line has been logged yet."""
    entries = [*trainer.state.log_history, getattr(trainer, "_cost_logs", {})]
    return next((int(entry[name]) for entry in entries if name in entry), None)


def _will_be_packed(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLayer) and module.weight_quantizer for module in model.modules())


def _points(logs: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), entry[name]) for entry in logs if name in entry]


def _method(trainer: Any, saq_config: SAQConfig) -> str:
    case, teacher = saq_config.case, _teacher(trainer)
    name = "SAQ" if case == 3 else f"SAQ case {case}"
    text = f"{name} ([Sharpness-Aware Quantization](https://arxiv.org/abs/2111.12273), case {case})"
    if case is None:
        text = "QAT (plain quantization-aware training)"
    return text if teacher is None else f"{text} and knowledge distillation from {teacher}"


def hyperparameters_of_run(trainer: Any, saq_config: SAQConfig) -> dict[str, Any]:
    """Return the settings of the perturbation and of the teacher, as far as the run has them.

    Radius and knobs that were not given are those that were used in their place.
    """
    minimizer, step = getattr(trainer, "minimizer", None), getattr(trainer, "scheduled_step", None)
    used = {} if minimizer is None or step is None else {"rho": minimizer.rho, **asdict(step.schedule)}
    found = saq_config.to_dict() if saq_config.case is not None else {}
    found = {name: used.get(name, value) if value is None else value for name, value in found.items()}
    if (teacher := _teacher(trainer)) is not None:
        found |= {"teacher": teacher, "distill_alpha": trainer.distill_alpha}
        found |= {"distill_temperature": trainer.distill_temperature}
    return found


def _teacher(trainer: Any) -> str | None:
    """Name the class of the model that is learnt from, and its repository if it came from one."""
    teacher = getattr(trainer, "teacher", None)
    if teacher is None:
        return None
    repository = on_the_hub(getattr(getattr(teacher, "config", None), "_name_or_path", None))
    return type(teacher).__name__ + (f" ({repository})" if repository else "")


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])

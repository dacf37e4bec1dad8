"""The models whose exports are compared: real ones, fine-tuned in float, quantized, and trained where bits are few."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_saq import SAQQuantizationConfig, calibrate, quantize

from ...shared.training_loop import fit, plain_loss
from ..task import Data, Paths
from ..tasks import TASKS
from ..training import CALIBRATION_BATCH, CALIBRATION_BATCHES, LossOf, autocast, float_state, images_of

FEW_BITS = 4
"""Weights of so many bits and fewer are trained; 8 bits are only calibrated."""


@dataclass(frozen=True)
class Quantized:
    """How one of the models is quantized.

    Attributes:
        task: A task of the accuracy benchmark, for images and float model.
        learning_rate: Of plain quantization-aware training.
        fields: Of `SAQQuantizationConfig`.
    """

    task: str
    learning_rate: float
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.task}-w{self.fields['weight_bits']}a{self.fields['activation_bits']}"


LEARNING_RATES = {"flowers": 1e-3, "flowers-vit": 3e-4}
BITS = ((8, 8), (4, 8), (4, 4))
"""Of weights and activations."""


def quantized_models(tasks: list[str]) -> list[Quantized]:
    return [
        Quantized(task, LEARNING_RATES[task], {**bits_of(*pair), **TASKS[task].quantization})
        for task in tasks
        for pair in BITS
    ]


def bits_of(weight_bits: int, activation_bits: int) -> dict[str, int]:
    return {"weight_bits": weight_bits, "activation_bits": activation_bits}


def model_of(wanted: Quantized, paths: Paths, steps: int, seed: int) -> PreTrainedModel:
    """The model that `wanted` describes: read from the cache, or trained and written there first."""
    bits = "".join(c if c.isalnum() else "-" for c in f"{wanted.name}-{steps}-{seed}")
    directory = paths.cache / "engines" / bits
    if not (directory / "config.json").is_file():
        train(wanted, paths, steps, seed).save_pretrained(directory)
    return AutoModelForImageClassification.from_pretrained(directory).eval()


def train(wanted: Quantized, paths: Paths, steps: int, seed: int) -> PreTrainedModel:
    """Quantize and calibrate the float model of the task, and train it if its weights have few bits."""
    task, data = TASKS[wanted.task], images_of(wanted.task, paths)
    float_model = task.build()
    float_model.load_state_dict(copy.deepcopy(float_state(wanted.task, paths, None, 0)))
    layout = torch.channels_last if task.channels_last else torch.contiguous_format
    model: Any = quantize(float_model, SAQQuantizationConfig(**wanted.fields)).to(memory_format=layout)
    calibrate(model, [batch for batch in calibration_batches(data)])
    if wanted.fields["weight_bits"] <= FEW_BITS:
        torch.manual_seed(seed)  # of dropout
        loss_of: LossOf = plain_loss
        if task.precision != "float32":
            loss_of = partial(autocast, getattr(torch, task.precision), plain_loss)
        batches = data.training_batches(data.training, task.batch_size, seed)
        fit(model, batches, steps, task.optimizer_of(model, wanted.learning_rate), loss_of=loss_of)
    return model.eval()


def calibration_batches(data: Data) -> list[Tensor]:
    shown = data.training[slice(0, CALIBRATION_BATCHES * CALIBRATION_BATCH)]
    return [batch["pixels"] for batch in data.evaluation_batches(shown, CALIBRATION_BATCH)]

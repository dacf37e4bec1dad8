"""What one run computes, in a process of the pool: a float model, quantized, calibrated, trained and scored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, quantize, reestimate_batch_norm
from hf_saq.training import distillation_loss

from ..shared.images import Batch, Images, draw_per_class
from ..shared.runs import fingerprint_of
from ..shared.schedule_variants import saq_config
from ..shared.stored_tensors import made_once
from ..shared.training_loop import accuracy, fit, logits_of, plain_loss
from .task import Data, Paths
from .tasks import TASKS

CALIBRATION_BATCHES, CALIBRATION_BATCH = 2, 128
DISTILL_TEMPERATURE = 2.0
LossOf = Callable[[nn.Module, Batch], Tensor]


def workers(processes: int) -> Executor:
    """What computes: this very process if there is to be one. One thread each: models and images are small."""
    if processes == 1:
        return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    return ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))


@lru_cache(maxsize=2)
def images_of(task_name: str, paths: Paths) -> Data:
    return TASKS[task_name].load(paths)


def ensure_float_model(task_name: str, paths: Paths) -> None:
    float_state(task_name, paths, None, 0)


@lru_cache(maxsize=4)
def float_state(task_name: str, paths: Paths, count: int | None, seed: int) -> dict[str, Tensor]:
    """The float model's weights; one that all seeds share is kept in the cache."""
    task, data = TASKS[task_name], images_of(task_name, paths)
    if task.float_per_seed:
        return task.train_float(paths, data, drawn(data, count, seed), seed).state_dict()
    return made_once(
        paths.cache / float_file(task_name),
        lambda: task.train_float(paths, data, data.training, 0).state_dict(),
    )


def float_file(task_name: str) -> str:
    """Name in the cache of the float model that all seeds share."""
    return f"{task_name}-float.safetensors"


def drawn(data: Data, count: int | None, seed: int) -> Images:
    return data.training if count is None else draw_per_class(data.training, count, seed)


@dataclass(frozen=True)
class Prepared:
    """What a run starts from: images of a seed, the float model, and its quantized, calibrated self."""

    data: Data
    images: Images
    state: dict[str, Tensor]
    float_model: nn.Module
    model: nn.Module
    layout: torch.memory_format
    device: torch.device

    def score(self, model: nn.Module, images: Images) -> float:
        batches = self.data.evaluation_batches(images)
        return accuracy(model.to(self.device), (moved(batch, self.device, self.layout) for batch in batches))


def prepared(arguments: dict[str, Any], paths: Paths) -> Prepared:
    """Quantize and calibrate the float model of a run."""
    task, data = TASKS[arguments["task"]], images_of(arguments["task"], paths)
    seed, count, device = arguments["seed"], arguments["images_per_class"], torch.device(arguments["device"])
    images = drawn(data, count, seed)
    state = float_state(
        arguments["task"], paths, count if task.float_per_seed else None, seed if task.float_per_seed else 0
    )
    float_model = task.build()
    float_model.load_state_dict(copy.deepcopy(state))
    bits = arguments["bits"]
    config = SAQQuantizationConfig(weight_bits=bits, activation_bits=bits, **arguments["quantization"])
    layout = torch.channels_last if task.channels_last else torch.contiguous_format
    model = quantize(copy.deepcopy(float_model), config).to(device, memory_format=layout)  # type: ignore[call-overload]
    shown = data.evaluation_batches(images[slice(0, CALIBRATION_BATCHES * CALIBRATION_BATCH)], CALIBRATION_BATCH)
    calibrate(model, [moved(batch, device, layout)["pixels"] for batch in shown])
    return Prepared(data, images, state, float_model, model, layout, device)


def train(arguments: dict[str, Any], start: Prepared) -> dict[str, Any]:
    """Train the model of `start` in place, and sum up how it went."""
    task, seed, model, device = TASKS[arguments["task"]], arguments["seed"], start.model, start.device
    saq = None if arguments["saq"] is None else saq_of(arguments["saq"])
    drawn_batches = start.data.training_batches(start.images, task.batch_size, seed)
    batches = (moved(batch, device, start.layout) for batch in drawn_batches)
    torch.manual_seed(seed)  # of dropout
    loss_of: LossOf = plain_loss
    if arguments["distill_alpha"]:
        loss_of = partial(distilled, teacher(start.float_model, device), arguments["distill_alpha"])
    if arguments.get("precision"):
        loss_of = partial(autocast, getattr(torch, arguments["precision"]), loss_of)
    outcome = fit(
        model,
        twice(batches) if arguments.get("echoed") else batches,
        arguments["steps"],
        task.optimizer_of(model, arguments["lr"]),
        saq,
        loss_of,
    )
    if arguments.get("clean_batches"):
        reestimate_batch_norm(model, [batch["pixels"] for batch in islice(batches, arguments["clean_batches"])])
    return outcome


def train_one(arguments: dict[str, Any], paths: Paths) -> dict[str, Any]:
    """Quantize, calibrate, train and score one model: validation accuracy and, if it is no trial, test accuracy."""
    start = prepared(arguments, paths)
    outcome = train(arguments, start)
    return {**outcome, **scores(arguments, start)}


def scores(arguments: dict[str, Any], trained: Prepared) -> dict[str, Any]:
    """Score a trained model."""
    outcome = {
        "validation": trained.score(trained.model, trained.data.validation),
        "float_model": fingerprint_of(trained.state),
        "training_images": len(trained.images),
    }
    if arguments["kind"] == "run":
        test = trained.data.test[slice(0, arguments["test_images"])]
        outcome["test"] = trained.score(trained.model, test)
        outcome["float_test"] = trained.score(trained.float_model, test)
    return outcome


def saq_of(stored: dict[str, Any]) -> SAQConfig:
    fields = dict(stored)
    return saq_config(fields.pop("rho"), fields)


def moved(batch: Batch, device: torch.device, layout: torch.memory_format) -> Batch:
    pixels = batch["pixels"].to(device, memory_format=layout)
    return {"pixels": pixels, "labels": batch["labels"].to(device)}


def twice(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Each batch two times in a row, its augmentation included."""
    for batch in batches:
        yield batch
        yield batch


def teacher(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def autocast(precision: torch.dtype, loss_of: LossOf, model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast(batch["labels"].device.type, precision):
        return loss_of(model, batch)


def distilled(float_model: nn.Module, alpha: float, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        expected = logits_of(float_model, batch["pixels"])
    found = logits_of(model, batch["pixels"])
    return distillation_loss(found, expected, batch["labels"], alpha, DISTILL_TEMPERATURE)

"""Every way to train whose step is timed, on one model that all of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.sharpness.schedules import ScheduledStep
from hf_saq.sharpness.schedules.rules.trigger import NormTrigger

from ..shared.schedule_variants import ECHOED, QAT, VARIANTS, saq_config
from ..shared.training_loop import adamw
from .latent_sam import latent_sam_step
from .models import CLASSES, MODELS

BITS = 4
RHO = 0.05
LEARNING_RATE = 1e-5
TOTAL_STEPS = 10**6
"""Far more than are run: progress stays at zero."""
FLOAT, AGAIN, SAM = "float", "qat again", "sam on latent weights"
WAYS: dict[str, dict[str, Any] | None] = {
    FLOAT: None,
    QAT: VARIANTS[QAT],
    AGAIN: VARIANTS[QAT],
    SAM: None,
    # "start 0.5" has half of the steps at cost 1, half at cost 2, and no step of another kind; echoed batches without
    # a perturbation cost what QAT does.
    **{name: config for name, config in VARIANTS.items() if name not in (QAT, "start 0.5", ECHOED)},
    "last sixth": {"ascent_depth": 1 / 6},
    "head": {"ascent_depth": 0.02},
    "last quarter, every 2nd step": {"ascent_depth": 0.25, "interval": 2},
}
"""Fields of `SAQConfig` of each way to train, `None` for what is no SAQ. `qat again` shows how exact a ratio is.

Presets are among them, under the names of what they stand for."""
AT_SIZE = ("echo 2", "echo 3", "last eighth", "last sixth", "head", "last quarter, every 2nd step")
BY_DEFAULT = [name for name in WAYS if name not in AT_SIZE]
"""Those that are timed unless others are named. The rest are timed on models of the sizes that they are trained on."""


class EverySecond(NormTrigger):
    """Decides as ever and then fires at every second step, so that the cost of one that fires can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def fires(self, squared_norm: float, progress: float) -> bool:
        super().fires(squared_norm, progress)
        self.count += 1
        return self.count % 2 == 0


@dataclass
class Bench:
    """One model in float and quantized, each with its optimizer, and the batch they all train on.

    Attributes:
        wrapped: The quantized model as it is called: in DDP if there are several processes.
        precision: Of products, by autocast; `None`: float32.
    """

    float_model: nn.Module
    float_optimizer: torch.optim.Optimizer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module
    batch: dict[str, Tensor]
    precision: torch.dtype | None = None

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(batch["pixels"].device.type, self.precision, enabled=self.precision is not None):
            return cross_entropy(model(batch["pixels"]), batch["labels"])

    def backward(self, batch: dict[str, Tensor], reduce: bool = True) -> Tensor:
        skip = not reduce and isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if skip else nullcontext():  # type: ignore[operator]
            loss = self.loss(self.wrapped, batch)
            loss.backward()
        return loss.detach()


def prepare(arguments: dict[str, Any]) -> Bench:
    """Random weights, images and labels; 4 bits, 8 in the first and last layer."""
    torch.manual_seed(0)
    kind, device = MODELS[arguments["model"]], torch.device(arguments["device"])
    float_model = kind.build().to(device).train()
    batch = {
        "pixels": torch.randn(arguments["batch_size"], 3, kind.image_size, kind.image_size, device=device),
        "labels": torch.randint(CLASSES, (arguments["batch_size"],), device=device),
    }
    model = quantize(
        copy.deepcopy(float_model),
        SAQQuantizationConfig(weight_bits=arguments["bits"], activation_bits=arguments["bits"]),
    )
    calibrate(model, [batch["pixels"]])
    model.train()

    def wrap(m: nn.Module) -> nn.Module:
        return DistributedDataParallel(m) if arguments["processes"] > 1 else m

    float_optimizer, optimizer = adamw(float_model, LEARNING_RATE), adamw(model, LEARNING_RATE)
    precision = getattr(torch, arguments["precision"]) if "precision" in arguments else None
    return Bench(wrap(float_model), float_optimizer, model, optimizer, wrap(model), batch, precision)


def untimed_steps(way: str, period: int) -> int:
    """Steps before the clock runs, whole periods: with `reuse="previous"` the first one finds nothing of an earlier
    one, and the first perturbed step of last layers alone tries where these begin."""
    return 1 if period == 1 else period if "ascent_depth" in (WAYS[way] or {}) else 0


@contextmanager
def one_step_of(way: str, bench: Bench) -> Iterator[tuple[Callable[[], object], int]]:
    """A function that takes one optimizer step, and after how many of them the kinds of steps repeat.

    The model is afterwards as if no minimizer had ever been there.
    """
    config = WAYS[way]
    if way == FLOAT:

        def float_step() -> None:
            bench.loss(bench.float_model, bench.batch).backward()
            bench.float_optimizer.step()
            bench.float_optimizer.zero_grad()

        yield float_step, 1
    elif way == SAM:
        backward = partial(bench.backward, bench.batch)
        yield lambda: latent_sam_step(bench.model, bench.optimizer, RHO, backward), 1
    elif config is None or config.get("case", 3) is None:

        def plain_step() -> None:
            bench.backward(bench.batch)
            bench.optimizer.step()
            bench.optimizer.zero_grad()

        yield plain_step, 1
    else:
        saq = saq_config(RHO, config)
        schedule = saq.perturbation_schedule()
        minimizer = SharpnessAwareMinimizer(bench.model, RHO, saq.case, saq.adaptive)  # type: ignore[arg-type]
        scheduled = ScheduledStep(minimizer, schedule)
        scheduled.rule.trigger = EverySecond()  # type: ignore[attr-defined]
        taken = 0

        def scheduled_step() -> None:
            nonlocal taken
            scheduled.micro_batch(0, [bench.batch], bench.backward, taken, TOTAL_STEPS)
            bench.optimizer.step()
            bench.optimizer.zero_grad()
            taken += 1

        try:
            yield scheduled_step, 2 if schedule.trigger else schedule.interval
        finally:
            minimizer.detach()

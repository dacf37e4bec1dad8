"""The training loop that benchmarks share: any model, any optimizer, with or without the perturbation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_saq import SAQConfig, SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import ScheduledStep
from hf_saq.training.parameter_groups import parameter_groups

from .images import Batch

MOMENTUM = 0.9
SCALE_LR_RATIO = 0.1


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum; quantizers' values at a tenth of the rate; no decay but of weights."""
    groups = parameter_groups(model, lr, weight_decay, SCALE_LR_RATIO)
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with the groups of [`sgd`]."""
    groups = parameter_groups(model, lr, weight_decay, SCALE_LR_RATIO)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """`(n, classes)`, of models that return logits and of those of transformers."""
    outputs = model(pixels)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(logits_of(model, batch["pixels"]), batch["labels"])


def take_steps(
    model: nn.Module,
    batches: Iterator[Batch],
    total: int,
    optimizer: torch.optim.Optimizer,
    saq: SAQConfig | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = plain_loss,
    warmup: int = 0,
) -> tuple[list[Tensor], int]:
    """Train `model` in place for `total` steps, the learning rate along a cosine to zero.

    Args:
        saq: When and how to perturb; `None` or `case=None`: never.
        warmup: First steps, in which the learning rate rises to where the cosine starts.

    Returns:
        The loss that each step reported, and how many of the steps were perturbed.
    """
    scheduler = _cosine(optimizer, total, warmup)
    scheduled = None
    if saq is not None and saq.case is not None:
        assert saq.rho is not None
        minimizer = SharpnessAwareMinimizer(model, saq.rho, saq.case, saq.adaptive, saq.eta, saq.perturb)  # type: ignore[arg-type]
        scheduled = ScheduledStep(minimizer, saq.perturbation_schedule())

    def backward(batch: Batch, reduce: bool = True) -> Tensor:  # noqa: ARG001 (one process)
        loss = loss_of(model, batch)
        loss.backward()
        return loss.detach()

    model.train()
    losses: list[Tensor] = []
    perturbed = 0
    for step in range(total):
        batch = next(batches)
        if scheduled is None:
            losses.append(backward(batch))
        else:
            outcome = scheduled.micro_batch(0, [batch], backward, step, total)
            losses.append(outcome.loss)
            perturbed += outcome.ascent_norm is not None
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    if scheduled is not None:
        minimizer.detach()
    return losses, perturbed


def _cosine(optimizer: torch.optim.Optimizer, total: int, warmup: int) -> torch.optim.lr_scheduler.LRScheduler:
    if not warmup:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    total: int,
    optimizer: torch.optim.Optimizer,
    saq: SAQConfig | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = plain_loss,
    last: int = 16,
    warmup: int = 0,
) -> dict[str, Any]:
    """Train as [`take_steps`] does and sum up how it went.

    Args:
        last: Number of last steps whose losses are averaged.

    Returns:
        `steps`; `passes`, forward and backward, that an image of a step went through, as counted; `cpu_seconds` of
        this process; `training_loss`, the mean that the last steps reported;
        `perturbed_share` of the steps.
    """
    started = time.process_time()
    given = passed = 0

    def counted_batches() -> Iterator[Batch]:
        nonlocal given
        for batch in batches:
            given += len(batch["labels"])
            yield batch

    def counted_loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal passed
        passed += len(batch["labels"])
        return loss_of(model, batch)

    losses, perturbed = take_steps(model, counted_batches(), total, optimizer, saq, counted_loss, warmup)
    return {
        "steps": total,
        "passes": passed / given,
        "cpu_seconds": time.process_time() - started,
        "training_loss": torch.stack(losses[-last:]).mean().item(),
        "perturbed_share": perturbed / total,
    }


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[Batch]) -> float:
    """Share of images whose highest logit is that of their class, 0 to 1. Leaves `model` in evaluation mode."""
    model.eval()
    hits = total = 0
    for batch in batches:
        hits += int((logits_of(model, batch["pixels"]).argmax(dim=1) == batch["labels"]).sum())
        total += len(batch["labels"])
    return hits / total

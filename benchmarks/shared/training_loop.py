"""The training loop that benchmarks of accuracy share: any model, any optimizer, with or without the perturbation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_saq import SAQConfig, SharpnessAwareMinimizer
from hf_saq.sharpness.schedules.step import ScheduledStep

Batch = dict[str, Tensor]
"""`pixels` `(n, channels, height, width)`, float32, and `labels` `(n,)`."""


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """`(n, classes)`, of models that return logits and of those of transformers."""
    outputs = model(pixels)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(logits_of(model, batch["pixels"]), batch["labels"])


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    total: int,
    optimizer: torch.optim.Optimizer,
    saq: SAQConfig | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = plain_loss,
    last: int = 16,
) -> dict[str, Any]:
    """Train `model` in place for `total` steps, the learning rate along a cosine to zero.

    Args:
        saq: When and how to perturb; `None` or `case=None`: never.
        last: Number of last steps whose losses are averaged.

    Returns:
        `steps`; `cpu_seconds` of this process; `training_loss`, the mean that the last steps reported;
        `perturbed_share` of the steps.
    """
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
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
    started = time.process_time()
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
    return {
        "steps": total,
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

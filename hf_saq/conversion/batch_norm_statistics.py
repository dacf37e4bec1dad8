"""Re-estimate the running statistics of batch norms for the model as it is: quantized, and not perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .observing import run_observed, run_on_device
from .observing.alike import several_processes


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any] | None = None
) -> nn.Module:
    """Replace the running statistics of the batch norms of `model`, in place, by their means over `batches`.

    Running statistics lag behind the weights, and a schedule may take them from perturbed weights. These are those of
    the model that is evaluated: everything but the batch norms is in evaluation mode, without dropout, and each batch
    counts the same ("PreciseBN", Wu and Johnson, arXiv:2105.07576, section 3).

    Where torch.distributed is initialized, all processes must call this, each with as many batches of its own:
    statistics are averaged over processes, as if one process had run all batches.

    Args:
        model: Any model. Batch norms whose `momentum` is 0 count as frozen and are left alone; if it is in training
            mode, those in evaluation mode too.
        batches: Model inputs, each a tensor, a tuple or list of positional inputs, or a dict of keyword inputs; they
            are moved to the model's device. A few hundred images are enough.
        run: Runs the model on one batch, where calling the model with it is not the way. Batches may then be of any
            type.

    Returns:
        `model` itself, in the mode it was in.

    Raises:
        ValueError: If there is no batch, or one is of another type or does not fit the model's inputs. The statistics
            are then as before.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise ValueError(
            f"reestimate_batch_norm: `batches` is a {type(batches).__name__}; expected a list of batches."
        )
    norms = norms_with_statistics(model)
    if not norms:
        return model
    before = [(norm.momentum, _copies(norm)) for norm in norms]

    def run_one(batch: Any) -> None:
        for norm in norms:
            norm.train()
        if run is None:
            run_on_device(model, batch)
        else:
            run(batch)

    completed = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's way to say that each batch counts the same
        if run_observed(model, batches, {}, run_one) == 0:
            raise ValueError("reestimate_batch_norm: `batches` is empty; expected at least one batch of model inputs.")
        _average_over_processes(norms)
        completed = True
    finally:
        for norm, (momentum, (mean, variance, count)) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
            if not completed:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
    return model


@contextmanager
def batches_where_statistics_are_new(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms of `model` whose running statistics were never updated normalize by those of each batch, as
    they will in training; they come out as they were.

    A fresh model has them, and so has a fresh head on a pretrained body. With a mean of 0 and a variance of 1 they do
    not normalize at all, and layers after them would see values of another size than in training.
    """
    new = [norm for norm in _norms_in_training(model) if _is_new(norm)]
    hooks = [norm.register_forward_pre_hook(_normalize_by_the_batch) for norm in new]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm in new:
            norm.reset_running_stats()


def _is_new(norm: Any) -> bool:
    """Tell whether running statistics are those that a norm is built with; converted models may have counted none."""
    untouched = not norm.num_batches_tracked and not norm.running_mean.any() and bool((norm.running_var == 1).all())
    return untouched and not isinstance(norm, nn.SyncBatchNorm)  # processes may run batches of their own


def _normalize_by_the_batch(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    norm.train(inputs[0].numel() > inputs[0].shape[1])  # one value for each channel has no variance


def norms_with_statistics(model: nn.Module) -> list[Any]:
    """List the batch norms of `model` that keep running statistics, without those that are frozen."""
    return [norm for norm in _norms_in_training(model) if norm.momentum != 0]


def _norms_in_training(model: nn.Module) -> list[Any]:
    """List those that normalize by the batch in training; with a momentum of 0 they do so and keep what they have."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.training or not model.training)
    ]


def _copies(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()


def _average_over_processes(norms: list[Any]) -> None:
    if not several_processes():
        return
    for statistics in [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]:
        dist.all_reduce(statistics)
        statistics.div_(dist.get_world_size())

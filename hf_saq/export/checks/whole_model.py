"""Compare the logits of a shipped graph with those of the model, by the measure of the model itself.

At low bits no two computations of a quantized model agree: one rounding that flips is carried on and grows. How far
the model in float32 is from itself, computed in float64 or with a little noise on what it quantizes, says how much: a
very little for the graph as it is written, a little for what engines make of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...outputs import class_axis, logits_of
from ...quantizers import Quantizer
from ..tracing import OUTPUT
from .sessions import run_graph

STEP_NOISE = 0.01
"""Noise on what is quantized, in steps. Integer engines round the bias of a layer, which moves its outputs as much;
that no more of them flip is verified layer by layer (`layers_alone`)."""
ROUNDING_NOISE = 1e-4
"""The same for a graph that is computed node by node in float32: sums in another order move them by less than this."""
NOISES = 3
ALLOWED = 4.0
"""How many times the model's own noise the difference may be, both as root mean squares."""
UNRELATED = 0.5
"""More than this, as a share of the root mean square of the logits, is too much: unrelated logits differ by 1 or more.
Only a model whose own noise is larger still may differ by as much as that."""
SMALL = 2e-3
"""What it may be in any case, as a share of the root mean square of the logits."""


@dataclass(frozen=True)
class Agreement:
    """Says how logits of an engine compare with those of the model.

    Attributes:
        difference: Root mean square of the differences, as a share of that of the logits.
        own_noise: The same of the model with itself: see [`OwnLogits`].
        same_top1: How many of the predictions are the same class.
        count: How many predictions there were: one for each input, or for each of its pixels or queries.
    """

    difference: float
    own_noise: float
    same_top1: int
    count: int

    @property
    def holds(self) -> bool:
        allowed = max(min(ALLOWED * self.own_noise, UNRELATED), self.own_noise, SMALL)
        return self.difference <= allowed  # NaN is not

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.1e} (the model from itself: {self.own_noise:.1e}), "
            f"{self.same_top1} of {self.count} top-1 equal"
        )


class OwnLogits(NamedTuple):
    """Holds what a model answers, and how far it is from itself.

    Attributes:
        logits: Of the model in float32 on the CPU.
        noise: Largest root mean square of differences to it, as a share of that of the logits, of the model in float64
            and with noise of `STEP_NOISE`.
        rounding: The same with noise of `ROUNDING_NOISE`.
    """

    logits: np.ndarray
    noise: float
    rounding: float


@torch.no_grad()
def own_logits(model: nn.Module, example: Tensor) -> OwnLogits:
    """Compute the logits of `model` and its noise."""
    single = _in(model, torch.float32)
    logits = logits_of(single(example)).numpy()
    in_double = logits_of(_in(model, torch.float64)(example.double())).numpy()

    def noise(share: float) -> float:
        others = [in_double]
        for seed in range(NOISES):
            with _noise_before_quantizers(single, seed, share):
                others.append(logits_of(single(example)).numpy())
        return max(_relative(other - logits, logits) for other in others)

    return OwnLogits(logits, noise(STEP_NOISE), noise(ROUNDING_NOISE))


@contextmanager
def _noise_before_quantizers(model: nn.Module, seed: int, share: float) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def add_noise(quantizer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        noise = torch.rand(args[0].shape, generator=generator) * 2 - 1
        return args[0] + share * quantizer.grid()[0] * noise, *args[1:]

    quantizers = [m for m in model.modules() if isinstance(m, Quantizer) and m.role == "activation"]
    handles = [quantizer.register_forward_pre_hook(add_noise) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_in_float32(model: nn.Module, example: Tensor) -> np.ndarray:
    return logits_of(_in(model, torch.float32)(example)).numpy()


def agreement(
    content: bytes, logits: np.ndarray, own_noise: float, example: Tensor, input_name: str, engine: str
) -> Agreement:
    """Run a graph of one input and one output on `example` and compare.

    Args:
        engine: A key of `RUNS`.
    """
    found = run_graph(engine, content, {input_name: example.numpy()})[OUTPUT]
    if found.shape != logits.shape:
        return Agreement(float("nan"), own_noise, 0, len(logits))
    axis = class_axis(logits.ndim)
    same = found.argmax(axis) == logits.argmax(axis)
    return Agreement(_relative(found - logits, logits), own_noise, int(same.sum()), same.size)


def _relative(difference: np.ndarray, logits: np.ndarray) -> float:
    return float(
        np.sqrt(np.mean(np.square(difference, dtype=np.float64)) / np.mean(np.square(logits, dtype=np.float64)))
    )


def _in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(copy.deepcopy(model), device="cpu", dtype=dtype).eval()

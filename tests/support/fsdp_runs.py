"""What `fsdp_worker.py` trains in two processes and tests of FSDP2 compute again in one."""

from __future__ import annotations

import torch
from tiny_models import seeded
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize

PROCESSES, STEPS, MICRO_BATCHES, BATCH = 2, 3, 2, 8
RHO, LEARNING_RATE = 0.2, 1e-3

RUNS = {
    "case 3 global": dict(case=3, sync="global"),
    "case 3 global adaptive": dict(case=3, sync="global", adaptive=True),
    "case 1 global": dict(case=1, sync="global"),
    "case 1 global adaptive": dict(case=1, sync="global", adaptive=True),
    "case 2 global": dict(case=2, sync="global"),
    "case 2 global adaptive": dict(case=2, sync="global", adaptive=True),
    "case 3 local": dict(case=3, sync="local"),
    "case 3 local adaptive": dict(case=3, sync="local", adaptive=True),
    "case 3 local, weights only": dict(case=3, sync="local", perturb=("weight",)),
}
"""Arguments of the minimizer."""


def net() -> nn.Module:
    """Quantized, in float64: one value across a rounding edge would hide everything else."""
    with seeded(0):
        model = nn.Sequential(
            nn.Linear(12, 15), nn.LayerNorm(15), nn.GELU(), nn.Linear(15, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        quantize(model, SAQQuantizationConfig(weight_bits=4, activation_bits=4))
        calibrate(model, [torch.randn(32, 12)])
    return model.double()


def batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    x = torch.randn(BATCH, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

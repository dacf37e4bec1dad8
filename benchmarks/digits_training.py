"""A task that repeats in seconds: few handwritten digits, a tiny ViT, and the training step that schedules share."""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_saq import SAQConfig, SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.parameter_groups import parameter_groups
from hf_saq.scheduled_step import ScheduledStep

SPLIT_SEED = 0
BITS = 2
BATCH_SIZE = 30
WEIGHT_DECAY = 0.05
SCALE_LR_RATIO = 0.1


@dataclass(frozen=True)
class Digits:
    """Pixels `(n, 1, 8, 8)` in [-1, 1] and labels `(n,)`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Digits:
        return Digits(self.pixels[index], self.labels[index])


def load_split(pool: int, validation: int) -> tuple[Digits, Digits, Digits]:
    """scikit-learn's 1,797 digits: `pool` to draw training images from, `validation` to choose by, the rest to test.

    Which image goes where never changes for one pair of sizes.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    everything = Digits(
        torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(bunch.target, dtype=torch.long)
    )
    if not 0 < pool < pool + validation < len(everything):
        raise ValueError(
            f"pool={pool}, validation={validation}: expected two positive numbers whose sum leaves some of the "
            f"{len(everything)} images to test on."
        )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED))
    everything = everything[order]
    end = pool + validation
    return everything[slice(0, pool)], everything[slice(pool, end)], everything[slice(end, None)]


def draw(pool: Digits, images: int, seed: int) -> Digits:
    """`images` of `pool`, another choice for each seed."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:images]]


def tiny_vit(seed: int) -> VisionTransformer:
    """4 patches of 4 x 4 pixels, one block of width 64 with 4 heads, 10 classes; no dropout."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=1,
        num_heads=4,
        mlp_ratio=2,
        weight_init="jax",  # Xavier; timm's usual 0.02 is made for hundreds of dimensions and slow to start here
    )


def quantized(float_state: dict[str, Tensor], images: Digits) -> nn.Module:
    """The float model quantized and calibrated on `images`."""
    model = tiny_vit(0)
    model.load_state_dict(copy.deepcopy(float_state))
    quantize(model, SAQQuantizationConfig(weight_bits=BITS, activation_bits=BITS))
    calibrate(model, [images.pixels])
    return model


def train(
    model: nn.Module,
    images: Digits,
    epochs: int,
    lr: float,
    seed: int,
    saq: SAQConfig | None = None,
) -> dict[str, Any]:
    """AdamW with a cosine from `lr` to zero, in place.

    Args:
        seed: Of the order of the images, alike for all that train with it for as many epochs.
        saq: When and how to perturb; `None` or `case=None`: never.

    Returns:
        `steps`; `cpu_seconds` of this thread's process; `training_loss`, the mean that the last epoch reported;
        `perturbed_share` of the steps.
    """
    count = -(-len(images) // BATCH_SIZE)
    total = epochs * count
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, WEIGHT_DECAY, SCALE_LR_RATIO), lr=lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    scheduled = None
    if saq is not None and saq.case is not None:
        assert saq.rho is not None
        minimizer = SharpnessAwareMinimizer(model, saq.rho, saq.case, saq.adaptive, saq.eta, saq.perturb)  # type: ignore[arg-type]
        scheduled = ScheduledStep(minimizer, saq.perturbation_schedule())

    def backward(batch: dict[str, Tensor], reduce: bool = True) -> Tensor:  # noqa: ARG001 (one process)
        loss = cross_entropy(model(batch["pixels"]), batch["labels"])
        loss.backward()
        return loss.detach()

    generator = torch.Generator().manual_seed(seed)
    model.train()
    started = time.process_time()
    losses: list[Tensor] = []
    perturbed = 0
    for step in range(total):
        if step % count == 0:
            order = torch.randperm(len(images), generator=generator)
        part = images[order[step % count * BATCH_SIZE : (step % count + 1) * BATCH_SIZE]]
        batch = {"pixels": part.pixels, "labels": part.labels}
        if scheduled is None:
            losses.append(backward(batch))
        else:
            outcome = scheduled.micro_batch(0, [batch], backward, step, total)
            losses.append(outcome.loss)
            perturbed += outcome.ascent_norm is not None
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    seconds = time.process_time() - started
    return {
        "steps": total,
        "cpu_seconds": seconds,
        "training_loss": torch.stack(losses[-count:]).mean().item(),
        "perturbed_share": perturbed / total,
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: Digits) -> float:
    """Share of `images` whose highest logit is that of their class, 0 to 1. Leaves `model` in evaluation mode."""
    model.eval()
    return (model(images.pixels).argmax(dim=1) == images.labels).float().mean().item()


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that differ where any value of `state` does."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

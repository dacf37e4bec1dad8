"""One small training run, the same for `SAQTrainer` in any number of processes and for the plain-PyTorch reference.

Everything is float64: in float32 a difference in the last bit sooner or later moves one value across a rounding edge.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from reference import to_reference, train_reference
from schedule_reference import train_with_schedule
from tiny_models import NUM_LABELS, TRANSFORMERS_MODELS, images
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, quantize

FAMILIES = ("vit", "convnext", "resnet", "mobilenet_v2")
HOW = {"plain": (None, "local"), **{f"{c}-{sync}": (c, sync) for c in (1, 2, 3) for sync in ("local", "global")}}
"""`case` and `sync` by a name of the two."""

SCHEDULES = [
    ("vit", 3, 2, "local", dict(reuse="previous")),
    ("resnet", 2, 1, "global", dict(reuse="previous")),
    ("vit", 3, 2, "local", dict(reuse="stale", interval=2)),
    ("vit", 1, 1, "global", dict(reuse="stale", interval=2, ascent_fraction=0.5)),
    ("vit", 3, 2, "local", dict(reuse="echo", interval=2)),
    ("resnet", 3, 2, "local", dict(reuse="look", interval=2)),
    ("vit", 3, 1, "global", dict(reuse="look", interval=2)),
    ("vit", 3, 2, "local", dict(trigger=True)),
    ("resnet", 1, 1, "global", dict(trigger=True)),
    ("vit", 1, 2, "local", dict(ascent_depth=0.5)),
    ("resnet", 3, 2, "global", dict(ascent_depth=0.5)),
]
"""Family, `case`, gradient accumulation, `sync` and knobs, of what runs in two processes."""

STILL = {"vit": ("vit.embeddings.", "vit.layers.0."), "resnet": ("resnet.embedder.embedder.convolution.",)}
"""What comes before the last layers that have at most half of the operations."""

BATCH, STEPS, RHO, LEARNING_RATE, SCALE_LR_RATIO = 4, 3, 0.2, 1e-4, 0.01


class Images(Dataset):
    """`count` random images with labels, in a fixed order."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float64):
        self.pixel_values = images(count, seed=17).to(dtype)
        self.labels = torch.randint(0, NUM_LABELS, (count,), generator=torch.Generator().manual_seed(8))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


class InOrder(SAQTrainer):
    """Without shuffling, so that a plain loop can see the same batches."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def quantized_model(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return copy.deepcopy(_quantized_once(family)).to(dtype)


@cache
def _quantized_once(family: str) -> nn.Module:
    """The search for step sizes takes longer than a training run of these tests, and always finds the same ones."""
    model = TRANSFORMERS_MODELS[family]()
    quantize(model, SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    return calibrate(model, [{"pixel_values": images(8)}])


def arguments(output_dir, **changes) -> TrainingArguments:
    defaults = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**{**defaults, **changes})


def make_trainer(
    family, case, accumulation, sync, output_dir, processes=1, cls=InOrder, knobs=None, dtype=torch.float64, **changes
) -> SAQTrainer:
    """`knobs`: further fields of `SAQConfig`. Running statistics stay those of training, as references keep them."""
    changes.setdefault("gradient_accumulation_steps", accumulation)
    callbacks = changes.pop("callbacks", None)
    steps = changes.get("max_steps", STEPS)
    return cls(
        quantized_model(family, dtype),
        arguments(output_dir, **changes),
        saq_config=SAQConfig(
            rho=RHO,
            case=case,
            sync=sync,
            scale_lr_ratio=SCALE_LR_RATIO,
            **{"norm_batches": 0, **(knobs or {"schedule": "full"})},
        ),
        train_dataset=Images(BATCH * steps * accumulation * processes, dtype),
        callbacks=callbacks,
    )


def loss_of(model: nn.Module, batch: tuple) -> torch.Tensor:
    return model(pixel_values=batch[0], labels=batch[1]).loss


def reference_set_up(family, accumulation, processes=1, count=STEPS) -> tuple[nn.Module, list, torch.optim.Optimizer]:
    """Model, batches by step, process and micro-batch (accelerate deals batch `k` to process `k % processes`), SGD."""
    model = to_reference(quantized_model(family))
    data = Images(BATCH * count * accumulation * processes)
    batches = list(zip(data.pixel_values.split(BATCH), data.labels.split(BATCH), strict=True))
    steps = []
    for step in range(count):
        rounds = [batches[(step * accumulation + micro) * processes :][:processes] for micro in range(accumulation)]
        steps.append([[one[rank] for one in rounds] for rank in range(processes)])
    scales = [p for name, p in model.named_parameters() if name.endswith("_scale")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_scale")]
    optimizer = torch.optim.SGD(
        [{"params": others}, {"params": scales, "lr": LEARNING_RATE * SCALE_LR_RATIO}], lr=LEARNING_RATE
    )
    return model, steps, optimizer


def reference_result(family, case, accumulation, sync, processes=1, max_grad_norm=0.0, sharded=False) -> nn.Module:
    """What the run must end with."""
    model, steps, optimizer = reference_set_up(family, accumulation, processes)
    how = dict(case=case, rho=RHO, sync=sync, sharded=sharded)
    train_reference(model, loss_of, steps, optimizer, max_grad_norm=max_grad_norm, **how)
    return model


def scheduled_reference(family, case, accumulation, sync, knobs, processes=1, count=STEPS) -> tuple[nn.Module, list]:
    """What a run under a schedule must end with, and what each step was."""
    model, steps, optimizer = reference_set_up(family, accumulation, processes, count)
    knobs = dict(knobs)
    still = STILL[family] if knobs.pop("ascent_depth", 1) == 0.5 else ()
    return model, train_with_schedule(model, loss_of, steps, optimizer, RHO, case, sync, still=still, **knobs)

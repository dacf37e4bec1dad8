"""What the example script does otherwise under FSDP, where training leaves a model in shards, for good."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer


def copies_of_float_model(trainer: Trainer, count: int) -> list[PreTrainedModel]:
    """Copies of the float model that `trainer` has trained and saved: from disk, if it lies in shards by now."""
    if not trainer.is_fsdp_enabled:
        return [copy.deepcopy(trainer.model) for _ in range(count)]
    trainer.accelerator.wait_for_everyone()  # the first process has written it
    return [AutoModelForImageClassification.from_pretrained(trainer.args.output_dir) for _ in range(count)]


@torch.no_grad()
def top1_of(model: PreTrainedModel, trainer: Trainer) -> float:
    """Share of the evaluation data of `trainer` that `model`, which is whole on each process, classifies right."""
    model = model.to(trainer.args.device).eval()
    hits = []
    for batch in trainer.get_eval_dataloader():
        with trainer.accelerator.autocast():
            logits = model(pixel_values=batch["pixel_values"].to(trainer.args.device)).logits
        hits.append(trainer.accelerator.gather_for_metrics(logits.argmax(dim=-1) == batch["labels"].to(logits.device)))
    return torch.cat(hits).double().mean().item()

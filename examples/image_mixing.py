"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) in training, by torchvision's transforms of whole batches."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_saq import SAQTrainer


def mixing(mixup_alpha: float, cutmix_alpha: float, classes: int) -> v2.Transform | None:
    """A transform of `(images, labels)` into mixed images and labels `(N, classes)`; `None` if both are off.

    With both on, each batch takes one of the two.
    """
    chosen: list[v2.Transform] = []
    if mixup_alpha > 0:
        chosen.append(v2.MixUp(alpha=mixup_alpha, num_classes=classes))
    if cutmix_alpha > 0:
        chosen.append(v2.CutMix(alpha=cutmix_alpha, num_classes=classes))
    return v2.RandomChoice(chosen) if chosen else None


class MixingTrainer(SAQTrainer):
    """A `SAQTrainer` that trains on mixed images, and evaluates on images as they are.

    Both passes of a step see the same mix, and a teacher too. Without `mix` nothing differs from `SAQTrainer`.
    """

    def __init__(self, *args: Any, mix: v2.Transform | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mix = mix
        if mix is not None:
            # The loss below is a mean over the micro-batch, which `Trainer` is to divide by their number.
            self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader:
        if self.mix is None:
            return super().get_train_dataloader()
        plain, self.data_collator = self.data_collator, self.collate_and_mix
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def collate_and_mix(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert self.mix is not None
        images = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        if len(rows) > 1:  # one image has nothing to be mixed with
            images, labels = self.mix(images, labels)
        else:
            labels = F.one_hot(labels, self.mix.transforms[0].num_classes).to(images.dtype)
        return {"pixel_values": images, "labels": labels}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy with the shares of the classes. Models of transformers would take such labels for others."""
        labels = inputs.get("labels")
        if self.teacher is not None or labels is None or labels.ndim != 2:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs["logits"], labels, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

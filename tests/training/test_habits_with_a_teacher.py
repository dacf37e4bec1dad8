"""What users change of a training with a teacher: images on their way to the step, the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import TRANSFORMERS_MODELS
from torch import nn
from training import BATCH, Images, InOrder, arguments, quantized_model

from hf_saq import SAQConfig
from hf_saq.training import distillation_loss

DATA = Images(2 * BATCH, torch.float32)


class Watched(nn.Module):
    """A teacher that keeps what it saw and answered."""

    def __init__(self):
        super().__init__()
        self.model = TRANSFORMERS_MODELS["vit"](seed=5)
        self.config, self.seen = self.model.config, []

    def forward(self, pixel_values):
        self.seen.append(pixel_values.clone())
        return self.model(pixel_values)


class Darker(InOrder):
    """Normalizes, mixes or darkens images in the step, as is done on a GPU."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {**inputs, "pixel_values": inputs["pixel_values"] * 0.5}
        return super().training_step(model, inputs, num_items_in_batch)


def trainer_of(cls, tmp_path, teacher, accumulation=1, **config):
    how = arguments(tmp_path, max_steps=1, learning_rate=1.0, gradient_accumulation_steps=accumulation)
    model = quantized_model("vit", torch.float32)
    saq_config = SAQConfig(scale_lr_ratio=1.0, **config)
    return cls(model, how, saq_config=saq_config, train_dataset=DATA, teacher=teacher, distill_alpha=0.7)


@pytest.mark.parametrize("config", [dict(case=None), dict(rho=0.0, schedule="full"), dict(rho=0.0)], ids=str)
def test_the_teacher_answers_to_the_images_that_are_trained_on(config, tmp_path):
    """It answered to the images before: the student learned answers to other images. One step of gradient descent,
    with a radius of zero, against its formula."""
    teacher = Watched()
    trainer = trainer_of(Darker, tmp_path, teacher, **config)
    before = copy.deepcopy(trainer.model).train()
    trainer.train()
    images = DATA.pixel_values[:BATCH] * 0.5
    assert len(teacher.seen) == 1 and torch.equal(teacher.seen[0], images)
    logits = before(images).logits
    distillation_loss(logits, teacher.model(images).logits, DATA.labels[:BATCH], 0.7, 1.0).backward()
    for (name, p), q in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p.detach() - q, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_each_micro_batch_is_asked_once(tmp_path):
    teacher = Watched()
    trainer_of(Darker, tmp_path, teacher, accumulation=2, rho=0.1, schedule="full", sync="global").train()
    assert [torch.equal(x, y * 0.5) for x, y in zip(teacher.seen, DATA.pixel_values.split(BATCH), strict=True)] == [
        True,
        True,
    ]


def test_a_loss_that_leaves_the_teacher_out_is_refused(tmp_path):
    """It took the labels alone, and the card said that the answers were most of the loss."""

    class Own(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class OwnAndTheirs(Own):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = InOrder.compute_loss(self, model, inputs, False, num_items_in_batch)
            return loss + 0.1 * super().compute_loss(model, inputs)

    with pytest.raises(RuntimeError, match="^Own.compute_loss did not call that of SAQTrainer, .* Call super"):
        trainer_of(Own, tmp_path, Watched(), rho=0.1).train()
    trainer_of(OwnAndTheirs, tmp_path, Watched(), rho=0.1).train()
    trainer_of(Own, tmp_path, None, rho=0.1).train()

"""A loss that changes its batch in the batch's own memory, as `Mixup` of timm does, changes it for one pass alone."""

from __future__ import annotations

import pytest
import torch
from minimizer_nets import assert_same_state, state_of
from training import BATCH, Images, InOrder, arguments, quantized_model

from hf_saq import SAQConfig
from hf_saq.training.analyses import measured_sharpness

STEPS = 2


class Mixes(InOrder):
    """Adds to each image the one that stands opposite in its batch, in new tensors."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        x = inputs["pixel_values"]
        inputs = {**inputs, "pixel_values": x * 0.75 + x.flip(0) * 0.25}
        return super().compute_loss(model, inputs, *args, **kwargs)


class MixesInPlace(InOrder):
    """Does so in the memory of the batch, as timm's `Mixup`: `x.mul_(lam).add_(...)`."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        x = inputs["pixel_values"]
        other = x.flip(0).mul_(0.25)
        x.mul_(0.75).add_(other)
        return super().compute_loss(model, inputs, *args, **kwargs)


class AsksForGradients(InOrder):
    """Attacks its images by the gradient that it asks for at them; `pixel_values.grad` adds up if they come again."""

    in_place = True

    def compute_loss(self, model, inputs, *args, **kwargs):
        x = inputs["pixel_values"] if self.in_place else inputs["pixel_values"].clone()
        outputs = model(pixel_values=x.requires_grad_(), labels=inputs["labels"])
        (x_grad,) = torch.autograd.grad(outputs.loss, x, retain_graph=True)
        x.grad = x_grad if x.grad is None else x.grad + x_grad
        return super().compute_loss(model, {**inputs, "pixel_values": x.detach() + x.grad}, *args, **kwargs)


class Apart(AsksForGradients):
    in_place = False


def trained(cls, tmp_path, knobs, steps: int = STEPS, **fields):
    torch.manual_seed(0)
    trainer = cls(
        quantized_model("resnet", torch.float32),
        arguments(tmp_path, max_steps=steps, learning_rate=1e-2, gradient_accumulation_steps=2),
        saq_config=SAQConfig(**knobs, **fields),
        train_dataset=Images(BATCH * 2 * steps, torch.float32),
    )
    trainer.train()
    return trainer


FULL, PART, ECHO = dict(schedule="full", sync="global"), dict(ascent_fraction=0.5), dict(reuse="echo", interval=2)


@pytest.mark.parametrize(
    ("which", "knobs"),
    [((MixesInPlace, Mixes), knobs) for knobs in (FULL, PART, ECHO)] + [((AsksForGradients, Apart), FULL)],
    ids=["mixes, full", "mixes, a part", "mixes, echo", "attacks, full"],
)
def test_the_passes_of_a_step_find_the_same_batch(which, knobs, tmp_path):
    """The second pass mixed what the first one had mixed, or attacked with the gradients of both."""
    found, expected = (trained(cls, tmp_path, knobs, rho=0.2, norm_batches=0) for cls in which)
    assert_same_state(found.model, state_of(expected.model))


def test_what_is_measured_on_a_batch_leaves_it_as_it_was(tmp_path, monkeypatch):
    """Bits are found by many losses of the same batches, and sharpness is that of the batch that was trained on."""
    monkeypatch.setattr(measured_sharpness, "STEPS_BETWEEN", 1)
    found, expected = (
        trained(cls, tmp_path, dict(case=None), rho=0.2, log_sharpness=True, bit_budget="0.95x")
        for cls in (MixesInPlace, Mixes)
    )
    assert found.allocation.overrides == expected.allocation.overrides
    logs = [[line["measured_sharpness"] for line in t.state.log_history if "loss" in line] for t in (found, expected)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3, abs=2e-6) and len(logs[0]) == STEPS

"""A loss with parameters of its own: a margin head, a learned temperature, the weights of several tasks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training import BATCH, Images, InOrder, arguments, quantized_model

from hf_saq import SAQConfig, parameter_groups

DATA = Images(2 * BATCH, torch.float32)
KNOBS = [
    dict(schedule="full"),
    dict(schedule="full", sync="global"),
    dict(schedule="balanced"),
    dict(trigger=True),
    dict(ascent_depth=0.5),
    dict(ascent_fraction=0.5, match_radius=True),
    dict(reuse="previous"),
]


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_logits = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs, labels, num_items_in_batch=None):  # noqa: ARG002
        return nn.functional.cross_entropy(outputs.logits * self.of_logits, labels)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_they_get_the_gradient_of_one_pass(knobs, tmp_path):
    """One step of gradient descent with a radius of zero, against its gradient: it was twice as long, as both passes
    left theirs, or that of a part of the batch as well."""
    loss, model = Temperature(), quantized_model("vit", torch.float32)
    plain = copy.deepcopy(model).train()
    groups = [*parameter_groups(model, 1e-3), {"params": [*loss.parameters()], "lr": 1.0}]
    trainer = InOrder(
        model,
        arguments(tmp_path, max_steps=1),
        saq_config=SAQConfig(rho=0.0, **knobs),
        train_dataset=DATA,
        compute_loss_func=loss,
        optimizers=(torch.optim.SGD(groups), None),
    )
    trainer.train()
    logits = plain(DATA.pixel_values[:BATCH]).logits.detach()
    temperature = torch.tensor(1.5, requires_grad=True)
    nn.functional.cross_entropy(logits * temperature, DATA.labels[:BATCH]).backward()
    torch.testing.assert_close(1.5 - loss.of_logits.detach(), temperature.grad, rtol=1e-4, atol=1e-7)

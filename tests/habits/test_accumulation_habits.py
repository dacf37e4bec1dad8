"""Micro-batches of unequal size, as the end of an epoch has them: a step is that of all their images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import BATCH, Images, InOrder, arguments, quantized_model

from hf_saq import SAQConfig, SharpnessAwareMinimizer

DATA = Images(BATCH + 1)
RHO = 0.3
HOW = [
    dict(case=None),
    dict(rho=0.0, schedule="full"),
    dict(rho=0.0, schedule="full", sync="global"),
    dict(rho=0.0, schedule="balanced"),
    dict(rho=0.0, trigger=True),
    *(
        pytest.param(dict(rho=0.0, **knobs), marks=pytest.mark.slow)
        for knobs in (
            dict(schedule="free"),
            dict(reuse="previous"),
            dict(reuse="stale", interval=2),
            dict(reuse="look", interval=2),
            dict(ascent_depth=0.5),
        )
    ),
]


def trained(tmp_path, labels: Tensor | None = None, **knobs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What one step of gradient descent takes away from each parameter, which is its gradient; and the log."""
    data = Images(BATCH + 1)
    if labels is not None:
        data.labels = labels
    model = quantized_model("vit")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    how = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, optim="sgd", learning_rate=1.0)
    trainer = InOrder(model, how, saq_config=SAQConfig(scale_lr_ratio=1.0, **knobs), train_dataset=data)
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, trainer.state.log_history[0]


def assert_gradients(found: dict[str, Tensor], model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("knobs", HOW, ids=str)
def test_without_a_radius_it_is_the_gradient_of_the_mean_over_all_images(knobs, tmp_path):
    found, log = trained(tmp_path, **knobs)
    model = quantized_model("vit").train()
    loss = cross_entropy(model(DATA.pixel_values).logits, DATA.labels)
    loss.backward()
    assert_gradients(found, model)
    logged = log.get("loss", log.get("perturbed_loss"))
    if "loss" in log and "perturbed_loss" in log:  # a single image has no part: its first pass was its loss
        logged = (BATCH * log["perturbed_loss"] + log["loss"]) / (BATCH + 1)
    assert logged == pytest.approx(loss.item(), abs=1e-5)


def test_each_micro_batch_has_its_own_eps_and_counts_by_its_images(tmp_path):
    found, _ = trained(tmp_path, rho=RHO, schedule="full")
    model = quantized_model("vit").train()
    minimizer = SharpnessAwareMinimizer(model, RHO)
    for start, size in ((0, BATCH), (BATCH, 1)):
        pixels, labels = (x[start : start + size] for x in (DATA.pixel_values, DATA.labels))
        with minimizer.ascent():
            cross_entropy(model(pixels).logits, labels).backward()
        with minimizer.perturbed():
            (cross_entropy(model(pixels).logits, labels) * size / (BATCH + 1)).backward()
    assert_gradients(found, model)


def test_ignored_labels_do_not_count(tmp_path):
    labels = DATA.labels.clone()
    labels[0] = labels[2] = -100
    found, _ = trained(tmp_path, labels, case=None)
    model = quantized_model("vit").train()
    cross_entropy(model(DATA.pixel_values).logits, labels).backward()
    assert_gradients(found, model)

"""One trainer, several trainings: what users change between them is what the next one does."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from minimizer_nets import assert_same_state, state_of
from tiny_models import vit
from training import BATCH, Images, InOrder, arguments, quantized_model

from hf_saq import SAQConfig, pack
from hf_saq.hub.run_facts import hyperparameters_of_run
from hf_saq.layers import QuantizedLayer
from hf_saq.quantizers import Quantizer

STEPS = 2
DATA = Images(BATCH * STEPS, torch.float32)
FIRST = SAQConfig(rho=0.1, schedule="full")


def trainer_of(config: SAQConfig, tmp_path, model=None) -> InOrder:
    how = arguments(tmp_path, max_steps=STEPS, learning_rate=1e-2)
    return InOrder(model or quantized_model("vit", torch.float32), how, saq_config=config, train_dataset=DATA)


def begin_again(trainer: InOrder) -> None:
    """Put back what a new trainer would begin with."""
    trainer.model.load_state_dict(quantized_model("vit", torch.float32).state_dict())
    trainer.optimizer = trainer.lr_scheduler = None


OTHERS = [
    SAQConfig(rho=0.5, schedule="full"),
    SAQConfig(rho=0.1, case=1, adaptive=True, schedule="full"),
    SAQConfig(rho=0.1, perturb=["weight"], interval=2),
    SAQConfig(rho=0.1, reuse="previous"),
    SAQConfig(case=None),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda config: str({k: v for k, v in vars(config).items() if v}))
@pytest.mark.parametrize("how", ["replaced", "field by field"])
def test_another_configuration_is_the_one_that_is_trained_with(other, how, tmp_path):
    """A user tries several radii with one trainer: it trained with the first of them each time, and the card had the
    others."""
    trainer = trainer_of(replace(FIRST), tmp_path)
    trainer.train()
    begin_again(trainer)
    if how == "replaced":
        trainer.saq_config = other
    else:
        vars(trainer.saq_config).update(vars(other))
    trainer.train()
    expected = trainer_of(other, tmp_path)
    expected.train()
    assert_same_state(trainer.model, state_of(expected.model))
    settings = [hyperparameters_of_run(one, one.saq_config) for one in (trainer, expected)]
    assert settings[0] == settings[1]


def test_from_plain_training_to_a_perturbed_one(tmp_path):
    """A user warms up without perturbation."""
    trainer = trainer_of(SAQConfig(case=None), tmp_path)
    trainer.sample_names.add("weights_of_samples")
    trainer.train()
    begin_again(trainer)
    trainer.saq_config = FIRST
    trainer.train()
    expected = trainer_of(FIRST, tmp_path)
    expected.train()
    assert_same_state(trainer.model, state_of(expected.model))
    assert "weights_of_samples" in trainer.sample_names


def test_the_hooks_of_former_steps_are_gone(tmp_path):
    trainer = trainer_of(replace(FIRST), tmp_path)
    for rho in (0.2, 0.3, 0.4):
        trainer.saq_config.rho = rho
        trainer.train()
    hooks = [len(m._forward_hooks) for m in trainer.model.modules()]
    assert hooks == [len(m._forward_hooks) for m in trainer_of(FIRST, tmp_path).model.modules()]


def test_the_hooks_of_trainers_that_are_gone_are_removed(tmp_path):
    """A user goes on with one model in a new trainer for each phase: every one left hooks on the model for good."""
    model = quantized_model("vit", torch.float32)
    for rho in (0.1, 0.2, 0.3):
        trainer_of(replace(FIRST, rho=rho), tmp_path, model).train()
        gc.collect()  # a trainer and its callbacks hold each other
    trainer = trainer_of(FIRST, tmp_path, model)
    assert len(trainer.model._forward_pre_hooks) == 1
    quantizers = [m.weight_quantizer for m in model.modules() if isinstance(m, QuantizedLayer)]
    assert {len(quantizer._forward_hooks) for quantizer in quantizers} == {1}


def test_skipped_perturbations_are_those_of_one_training(tmp_path):
    """The log of a second training began with the count of the first."""

    class WithoutGradient(InOrder):
        def compute_loss(self, *args, **kwargs):
            return 0 * super().compute_loss(*args, **kwargs)

    trainer = WithoutGradient(
        quantized_model("vit", torch.float32),
        arguments(tmp_path, max_steps=STEPS),
        saq_config=FIRST,
        train_dataset=DATA,
    )
    for _ in range(2):
        trainer.train()
        counts = [line["skipped_perturbations"] for line in trainer.state.log_history if "loss" in line]
        assert counts == [1, 2]


def test_another_model_is_perturbed(tmp_path):
    """A user goes over folds with one trainer and a fresh model for each: only the first was perturbed."""
    trainer = trainer_of(FIRST, tmp_path)
    trainer.train()
    trainer.model = trainer.model_wrapped = quantized_model("vit", torch.float32)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    expected = trainer_of(FIRST, tmp_path)
    expected.train()
    assert_same_state(trainer.model, state_of(expected.model))
    assert trainer.state.log_history[0]["ascent_norm"] > 0


def test_what_cannot_be_followed_is_told(tmp_path):
    trainer = trainer_of(replace(FIRST), tmp_path)
    trainer.train()
    trainer.saq_config.rho = -1.0
    with pytest.raises(ValueError, match=r"SAQConfig.rho=-1\.0; expected a finite number >= 0"):
        trainer.train()
    trainer.saq_config = replace(FIRST, bit_budget="0.8x")
    with pytest.raises(ValueError, match="new quantizers, whose values the optimizer that is there would not have"):
        trainer.train()
    trainer.saq_config = replace(FIRST, scale_lr_ratio=0.5)
    with pytest.warns(UserWarning, match=r"scale_lr_ratio=0\.5 is not applied to the optimizer that is there already"):
        trainer.train()
    former, trainer.model = trainer.model, quantized_model("vit", torch.float32)
    with pytest.raises(ValueError, match="trainer.model_wrapped, which Trainer trains, is the former one. Set both"):
        trainer.train()
    trainer.model = vit()
    with pytest.raises(ValueError, match="has no quantized layer"):
        trainer.train()
    trainer.model = pack(former)
    with pytest.raises(ValueError, match="holds packed integers, which cannot be trained"):
        trainer.train()


def test_bits_are_given_for_one_budget(tmp_path):
    """A budget may be set before the first training; a later one would be given to bits that are not uniform."""
    trainer = trainer_of(SAQConfig(case=None), tmp_path)
    trainer.saq_config.bit_budget = "0.8x"
    trainer.train()
    first, allocation = trainer.model, trainer.allocation
    assert allocation is not None
    trainer.train()
    assert trainer.allocation is allocation
    trainer.model = trainer.model_wrapped = quantized_model("vit", torch.float32)  # of uniform bits
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    bits = [[m.bits for m in model.modules() if isinstance(m, Quantizer)] for model in (trainer.model, first)]
    assert bits[0] == bits[1] and trainer.allocation is not allocation
    trainer.saq_config.bit_budget = "0.6x"
    with pytest.raises(ValueError, match="given for SAQConfig.bit_budget='0.8x', which is '0.6x' now"):
        trainer.train()

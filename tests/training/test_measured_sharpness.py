"""`measured_sharpness` in the log: what it is, when it comes, and that training does not notice."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TRANSFORMERS_MODELS, vit
from training import BATCH, Images, InOrder, arguments

from hf_saq import SAQConfig, SAQQuantizationConfig
from hf_saq.analysis import sharpness
from hf_saq.hub.training_picture import curves
from hf_saq.training.analyses import measured_sharpness

RHO = 0.2


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(measured_sharpness, "STEPS_BETWEEN", 2)


def trained(directory, steps=6, model=None, **saq) -> InOrder:
    trainer = InOrder(
        vit() if model is None else model,
        arguments(directory, max_steps=steps),
        saq_config=SAQConfig(**{"rho": RHO, **saq}),
        quantization_config=SAQQuantizationConfig(weight_bits=3, activation_bits=4),
        train_dataset=Images(BATCH * steps, torch.float32),
    )
    trainer.train()
    return trainer


def logged(trainer) -> dict[int, float]:
    key = measured_sharpness.KEY
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize(
    "saq",
    [{"schedule": "full"}, {}, {"reuse": "echo", "interval": 2}, {"case": None, "log_sharpness": True}],
    ids=["full", "default", "echo", "qat"],
)
def test_it_is_the_sharpness_of_the_last_batch(saq, tmp_path):
    trainer = trained(tmp_path, **saq)
    assert list(logged(trainer)) == [2, 4, 6]
    data = Images(BATCH * 6, torch.float32)
    last = {"pixel_values": data.pixel_values[-BATCH:], "labels": data.labels[-BATCH:]}
    found = sharpness(trainer.model, [last], RHO, power_iterations=1, trace_samples=2, progress=False)
    assert logged(trainer)[6] == pytest.approx(found.steepest.mean, abs=2e-6)  # it is rounded to six places
    assert "measured" in curves(trainer.state.log_history)["sharpness"]


@pytest.mark.parametrize("saq", [{}, {"case": None, "log_sharpness": True}], ids=["default", "qat"])
def test_no_batch_is_kept_when_training_is_over(saq, tmp_path):
    """It would hold memory of the device as long as the trainer lives."""
    trainer = trained(tmp_path, steps=2, **saq)
    assert logged(trainer)
    assert trainer._last_inputs is None and trainer._step_batches == trainer._used_batches == []


def test_training_goes_the_same_way_without_it(tmp_path):
    """A ResNet, whose running statistics are part of what must not change."""
    same = {"schedule": "full", "norm_batches": 0}
    ours = trained(tmp_path, model=TRANSFORMERS_MODELS["resnet"](), **same)
    without = trained(tmp_path, model=TRANSFORMERS_MODELS["resnet"](), log_sharpness=False, **same)
    assert logged(ours) and not logged(without)
    theirs = without.model.state_dict()
    assert any("running_mean" in name for name in theirs)
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_plain_training_is_measured_on_request_only(tmp_path):
    assert not logged(trained(tmp_path, steps=3, case=None))

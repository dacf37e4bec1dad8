"""Shares of oscillating weights stand in the log beside the loss."""

from __future__ import annotations

import pytest
import torch
from training import make_trainer

from hf_saq.training import OscillationCallback


@pytest.mark.parametrize("case", [None, 3], ids=["QAT", "SAQ"])
def test_the_log_has_it(case, tmp_path):
    callback = OscillationCallback(momentum=1.0)
    trainer = make_trainer("vit", case, 1, "local", tmp_path, learning_rate=0.3, max_steps=4)
    trainer.add_callback(callback)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == trainer.state.max_steps
    assert all({"oscillating_weights", "changed_codes"} <= set(entry) for entry in lines)
    assert lines[0]["oscillating_weights"] == 0 < lines[0]["changed_codes"]  # a first change turns nothing around
    assert lines[-1] | callback.to_log() == lines[-1]
    assert callback.counter.updates == trainer.state.global_step
    evaluation = trainer.evaluate(trainer.train_dataset)
    assert not any("oscillating" in name for name in evaluation)
    assert torch.isfinite(torch.tensor(lines[-1]["loss"]))

"""Cost of a step: a whole small run, and what a restart skips."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.step_cost import sweep as script


@pytest.mark.slow
def test_a_run_and_what_a_restart_skips(small, tmp_path, monkeypatch, capsys):
    given = ["--models", "small", "--batch_sizes", "2", "--rounds", "1", "--steps", "1", "--results", str(tmp_path)]
    script.main(given)
    path = tmp_path / "small-batch2-processes1-cpu.json"
    record = json.loads(path.read_text())
    outcome = record["outcome"]
    assert set(outcome["times"]) == set(outcome["bytes"]) == set(script.WAYS)
    assert outcome["times"]["qat"]["ratio"] == 1
    assert record["arguments"]["clock"] == "process" and outcome["threads"] == torch.get_num_threads()
    assert outcome["quantized_weight_bytes"] == 4 * (3 * 256 * 64 + 8 * 256 * 256 + 2560)

    weights = outcome["quantized_weight_bytes"]
    more = {way: (found - outcome["bytes"]["qat"]) / weights for way, found in outcome["bytes"].items()}
    assert abs(more["qat again"]) < 0.01
    assert 0.9 < more["full"] < 1.1  # eps, and nothing else of the size of the weights
    assert outcome["bytes"]["qat"] > 4 * weights  # weights, their gradients, and two moments

    monkeypatch.setattr(script, "measure", lambda arguments: pytest.fail("measured again"))
    script.main(given)
    assert "full" in capsys.readouterr().out
    with pytest.raises(ValueError, match="stored with other arguments"):
        script.main([*given, "--rounds", "2"])


def test_ratios_are_medians_of_rounds():
    found = script.compared([2.0, 9.0, 8.0], [1.0, 3.0, 1.0])
    assert found["ratio"] == 3.0
    assert found["lower_quartile"] == 2.0 and found["upper_quartile"] == 8.0
    assert script.compared([2.0], [1.0]) == {"ratio": 2.0, "lower_quartile": 2.0, "upper_quartile": 2.0}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--models", "vit"], r"--models \['vit'\]: unknown"),
        (["--ways", "fast"], r"--ways \['fast'\]: unknown"),
        (["--clock", "sun"], "--clock sun: expected process or wall"),
        (["--device", "cuda"], "--clock process does not see what cuda does"),
        (["--rounds", "0"], "--rounds 0 --steps 2: expected at least one"),
    ],
)
def test_mistakes(extra, message):
    with pytest.raises(ValueError, match=message):
        script.main(extra)

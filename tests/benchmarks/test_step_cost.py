"""Cost of a step: a whole small run, what a restart skips, and the parts against closed forms."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import step_cost as script  # noqa: E402
from latent_sam import latent_sam_step  # noqa: E402
from peak_memory import LiveTensors  # noqa: E402
from step_models import StepModel  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """A model whose memory is its weights: 2 MiB of them."""

    def build() -> nn.Module:
        layers = [nn.Linear(256, 256) for _ in range(8)]
        return nn.Sequential(nn.Conv2d(3, 256, 8), nn.Flatten(), *layers, nn.Linear(256, 10))

    monkeypatch.setitem(script.MODELS, "small", StepModel(build, 8))


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


def test_steps_in_a_period_are_those_of_the_schedule(small, monkeypatch):
    """Passes of two periods, by counting backwards: 1 + 1/k, 2, 1, and the trigger fires at every second step."""
    bench = script.prepare({"model": "small", "batch_size": 2, "device": "cpu", "bits": 4, "processes": 1})
    passes = []
    original = script.Bench.backward
    monkeypatch.setattr(script.Bench, "backward", lambda *a, **k: passes.append(1) or original(*a, **k))
    expected = {"interval 2": 1.5, "interval 5": 1.2, "stale 5": 1.2, "look 5": 1.2, "trigger": 1.5}
    expected |= {"full": 2, "qat": 1, "previous": 1, script.SAM: 2, "case 1": 2, "ascent 1/4": 2}
    for way, cost in expected.items():
        with script.one_step_of(way, bench) as (step, period):
            passes.clear()
            for _ in range(2 * period):
                step()
            assert len(passes) == pytest.approx(2 * period * cost), way
    assert not any(m._forward_hooks for m in bench.model.modules())  # as if no minimizer had been there


def test_latent_sam_is_sam():
    """On L = p^2 / 2 from p = 3: up by rho to 3.5, gradient there 3.5, down from 3 by 0.1 times that."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward() -> torch.Tensor:
        loss = model.weight.square().sum() / 2
        loss.backward()
        return loss

    loss = latent_sam_step(model, optimizer, 0.5, backward)
    assert loss.item() == 4.5
    torch.testing.assert_close(model.weight, torch.tensor([[3 - 0.1 * 3.5]]))
    assert model.weight.grad is None


def test_live_tensors_count_what_is_alive_at_once():
    x = torch.zeros(100)
    with LiveTensors([x, x.view(10, 10)]) as live:
        assert live.peak == 400  # one storage, seen twice
        a = x + 1
        b = a.view(4, 25)
        del a
        b.mul_(2)
        assert live.peak == 800
        del b
        c = x + 2
        assert live.peak == 800
        d = torch.cat([c, x])
    assert live.peak == 1600 and d.numel() == 200


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


def test_models_of_both_families_take_their_images():
    for name in ("vit-small-images", "resnet18-small-images"):
        kind = script.MODELS[name]
        images = torch.randn(1, 3, kind.image_size, kind.image_size)
        assert copy.deepcopy(kind.build()).eval()(images).shape == (1, script.CLASSES)

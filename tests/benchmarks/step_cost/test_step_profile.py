"""Where the time of a step goes: what operations are counted as, on a model whose operations are known."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks.step_cost import page as cost_page
from benchmarks.step_cost import step_profile as script
from benchmarks.step_cost.plain_steps import quantized, training_step
from hf_saq.quantizers import affine, set_backend


@pytest.fixture(autouse=True)
def eager():
    before = set_backend("eager")
    yield
    set_backend(before)


def test_parts_of_a_float_and_of_a_quantized_step():
    """Two linear layers: products in both; quantization and its gradient in the quantized one alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, labels = torch.randn(256, 64), torch.randint(0, 10, (256,))
    with script.marked():
        before = script.milliseconds(training_step(model, x, labels))
        after = script.milliseconds(training_step(quantized(model, x), x, labels))
    for found in (before, after):
        assert found["products"] > 0 and found["optimizer"] > 0 and found["activation functions"] > 0
        assert set(found) <= set(script.PARTS)
    of_quantizers = {script.FORWARD, script.BACKWARD}
    assert not of_quantizers & set(before)
    assert all(after[part] > 0 for part in of_quantizers)
    assert not any(hasattr(f, "__closure__") and f.__closure__ for f in (affine.quantize_forward,))  # unmarked again


def test_every_operation_counts_once(monkeypatch):
    """The parts add up to the profiler's own total; recomputed inputs of the backward pass count as quantization."""
    layer = quantized(nn.Linear(32, 32), torch.randn(8, 32))
    x = torch.randn(8, 32, requires_grad=True)
    names = []
    original = script.part_of

    def spied(event):
        part = original(event)
        names.append((event.name, part))
        return part

    monkeypatch.setattr(script, "part_of", spied)
    with script.marked():
        found = script.milliseconds(lambda: layer(x).sum().backward())
    rounds = [part for name, part in names if name == "aten::round_"]
    # Forward: input and weight. Backward: both for the gradients of scales, and the input once more, not kept.
    assert sorted(rounds) == sorted([script.FORWARD] * 3 + [script.BACKWARD] * 2)
    # One sum for the loss, one for the bias; two for the gradients of scales, which are small enough for one block.
    assert [part for name, part in names if name == "aten::sum"].count(script.BACKWARD) == 2
    assert sum(found.values()) > 0


def test_a_run_and_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        script.MODELS,
        "timm vit_small_patch16_224",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 32, 32), nn.Flatten(), nn.Linear(392, 1000)),
    )
    output = tmp_path / "step_profile.json"
    given = ["step_profile.py", "--models", "timm vit_small_patch16_224", "--batch", "2", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", [*given, "--output", str(output)])
    script.main()
    assert "convolutions" in capsys.readouterr().out
    found = json.loads(output.read_text())
    ways = found["milliseconds"]["timm vit_small_patch16_224"]
    assert list(ways["float"]) == list(ways["quantized"]) == script.PARTS
    assert ways["float"][script.FORWARD] == 0 < ways["quantized"][script.FORWARD]

    found["milliseconds"] = {"vit": {"float": {"products": 60.0}, "quantized": {"products": 75.0, "quantize": 25.0}}}
    found["milliseconds"]["vit"]["float"]["quantize"] = 0.0
    text = cost_page.step_in_parts(found)
    assert "| products | 60 | 75 | 75% |\n| quantize | 0 | 25 | 25% |\n| all | 60 | 100 | |" in text
    assert "batches of 2, W4A4" in text

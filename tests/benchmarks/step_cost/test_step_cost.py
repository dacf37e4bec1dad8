"""Cost of a step: a whole small run, what a restart skips, and the parts against closed forms."""

from __future__ import annotations

import copy
import json
import resource

import pytest
import torch
from torch import nn

from benchmarks.step_cost import page as cost_page
from benchmarks.step_cost import sweep as script
from benchmarks.step_cost.allocator import VARIABLES, allocator_settings, page_faults
from benchmarks.step_cost.latent_sam import latent_sam_step
from benchmarks.step_cost.models import StepModel
from benchmarks.step_cost.peak_memory import LiveTensors


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


def test_the_page_by_hand(tmp_path):
    """Records of two models; 130 bytes against 100 are 0.75 of 40 bytes of weights."""

    def record(model, ratio, batch=8, processes=1):
        ways = {"qat": 1.0, "qat again": 1.01, "full": ratio}
        outcome = {
            "times": {w: {"ratio": t, "lower_quartile": t - 0.1, "upper_quartile": t + 0.1} for w, t in ways.items()},
            "bytes": {w: 130 if w == "full" else 100 for w in ways},
            "quantized_weight_bytes": 40,
            "seconds_of_qat": 0.05,
            "threads": 1,
            "allocator": {},
            "device_name": "cpu",
        }
        arguments = {"model": model, "batch_size": batch, "processes": processes, "bits": 4, "rounds": 3}
        arguments |= {"clock": "process", "device": "cpu"}
        return {"arguments": arguments, "outcome": outcome, "versions": {"commit": "abc"}}

    (tmp_path / "step_cost").mkdir()
    for number, r in enumerate([record("resnet18", 1.8), record("vit-small", 1.9), record("vit-small", 2.1, 2, 2)]):
        (tmp_path / "step_cost" / f"{number}.json").write_text(json.dumps(r))
    layers = {
        "linear": {"ratio_to_float": {"eager": 1.126, "torchao": 1.2}},
        "conv": {"ratio_to_float": {"eager": 1.1}},
    }
    setting = {"bits": 4, "batch": 8, "threads": 2, "device": "cpu", "clock": "wall", "repetitions": 9}
    kept = {"MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "2"}
    fake = {"setting": {**setting, "allocator": kept, "versions": {"torch": "2"}}, "layers": layers}
    faults = {"float": 0, "eager": 7.0, "compiled": 5}
    ratios = {"eager": 1.153, "compiled": 1.1}
    fake["training_step"] = {"vit": {"seconds": {"float": 2.5}, "ratio_to_float": ratios, "page_faults": faults}}
    fake["kept_for_backward"] = {"vit": {"ratio": 1.184}}
    (tmp_path / "fake_quant.json").write_text(json.dumps(fake))
    fake["training_step"]["vit"] |= {"seconds": {"float": 0.5}, "ratio_to_float": {"eager": 1.4, "compiled": 1.3}}
    del fake["setting"]["allocator"]["MALLOC_TRIM_THRESHOLD_"]  # without it, memory is handed back
    fake["setting"]["versions"]["torchao"] = None
    (tmp_path / "fake_quant_other.json").write_text(json.dumps({**fake, "layers": {}}))
    cost_page.write_page(tmp_path, tmp_path / "docs" / "cost.md")
    text = (tmp_path / "docs" / "cost.md").read_text()
    rows = ["| vit | kept | 2500 | 1.15 | 1.10 | 1.18 | 0, 7, 5 |", "| vit | handed back | 500 | 1.40 | 1.30 | 1.18 |"]
    assert "\n".join(rows) in text and "1 thread(s) each, cpu, freed memory handed back," in text
    assert "| linear | 1.13 | 1.20 |\n| conv | 1.10 | - |" in text
    rows = [
        "| vit-small | 8 | 1 | 1.90 | - | - | 1.01 | +0.75 |",
        "| vit-small | 2 | 2 | 2.10 | - | - | 1.01 | +0.75 |",
    ]
    assert "\n".join([*rows, "| resnet18 | 8 | 1 | 1.80 | - | - | 1.01 | +0.75 |"]) in text
    assert "### vit-small, batches of 2, 2 processes" in text and "| full | 2.10 | 2.00 to 2.20 | +0.75 |" in text
    with pytest.raises(ValueError, match="found neither fake_quant.json nor"):
        cost_page.write_page(tmp_path / "docs", tmp_path / "page.md")


def test_what_the_environment_says_of_the_allocator(monkeypatch):
    for name in (*VARIABLES, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    assert allocator_settings() == {}
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "9")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2:/opt/other.so")
    assert allocator_settings() == {"MALLOC_TRIM_THRESHOLD_": "9", "LD_PRELOAD": "libjemalloc.so.2 other.so"}


def test_pages_that_a_step_makes_the_system_make():
    """64 MiB are more than glibc hands out without asking the system, whatever its settings were when it started."""
    size, huge_page = 64 * 2**20, 512 * resource.getpagesize()
    held = []
    found = page_faults(lambda: held.append(b"1" * size))
    assert found >= size // huge_page and page_faults(lambda: None) < found

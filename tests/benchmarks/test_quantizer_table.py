"""The table of quantizers: a whole small run, going on after an interruption, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quantizer_table as script  # noqa: E402
from cifar_resnet import CifarResNet  # noqa: E402
from generated_cifar import write_split  # noqa: E402
from quantizer_page import page  # noqa: E402
from runs import Runs  # noqa: E402

from hf_saq.quantizers import QUANTIZERS, LSQQuantizer, QuantizerSettings  # noqa: E402


@pytest.fixture
def arguments(tmp_path):
    """A command line for one quantizer on generated images and weights."""
    for seed, (split, count) in enumerate((("train", 24), ("test", 12))):
        write_split(tmp_path / "data", split, count, seed)
    state = {f"module.{name}": value for name, value in CifarResNet(20).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.th")
    paths = {name: str(tmp_path / name) for name in ("data", "results", "cache", "document.md", "weights.th")}
    return [
        *("--data", paths["data"], "--weights", paths["weights.th"], "--results", paths["results"]),
        *("--cache", paths["cache"], "--document", paths["document.md"]),
        *("--quantizers", "lsq", "--bits", "2", "--learning_rates", "0.01", "0.02"),
        *("--steps", "2", "--search_steps", "1", "--batch_size", "4", "--float_steps", "1", "--float_batch_size", "4"),
        *("--validation_images", "8", "--calibrated_images", "6"),
    ]


def stored(tmp_path):
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}


def test_a_run_and_what_a_restart_skips(arguments, tmp_path, monkeypatch):
    script.main(arguments)
    records = stored(tmp_path)
    assert set(records) == {
        "float-adaptation",
        *("lr-float-0.01", "lr-float-0.02", "lr-lsq-0.01", "lr-lsq-0.02"),
        *("float-w32a32-seed0", "lsq-w2a2-seed0", "first-weight-grids"),
    }
    run = records["lsq-w2a2-seed0"]
    assert {"torch", "transformers", "hf_saq", "python"} <= set(run["versions"])
    assert run["command"].startswith("python benchmarks/quantizer_table.py --data")
    assert run["seconds"] > 0
    moved = run["outcome"]["learned_values"]["layer2.0.conv1.weight_quantizer.scale"]
    assert moved[0] != moved[1]
    shown = (tmp_path / "document.md").read_text()
    outcome = run["outcome"]
    assert f"| lsq | {100 * outcome['test']:.1f} ({100 * outcome['test_calibrated']:.1f}) |" in shown

    # A restart trains nothing anew; after one result is lost, it trains that one, and gets the same again.
    trained = []
    original = script.train
    monkeypatch.setattr(script, "train", lambda *a, **k: trained.append(a) or original(*a, **k))
    (tmp_path / "document.md").unlink()
    script.main(arguments)
    assert not trained
    assert (tmp_path / "document.md").read_text() == shown
    (tmp_path / "results" / "lsq-w2a2-seed0.json").unlink()
    script.main(arguments)
    assert len(trained) == 1
    assert stored(tmp_path)["lsq-w2a2-seed0"]["outcome"] == run["outcome"]


@pytest.mark.parametrize("best", [0.01, 0.02])
def test_the_best_learning_rate_on_validation_is_taken(arguments, tmp_path, monkeypatch, best):
    tried = []

    def scored(material, trial):
        tried.append((trial["quantizer"], trial["bits"], trial["lr"], trial["steps"]))
        return {"validation": 0.9 if trial["lr"] == best else 0.1, "training_loss": 0.0}

    monkeypatch.setattr(script, "trial", scored)
    (args,) = HfArgumentParser(script.TableArguments).parse_args_into_dataclasses([*arguments, "--bits", "4", "2"])
    runs = Runs(tmp_path / "results", "python some.py")
    assert script.chosen_learning_rate(args, runs, None, "lsq", "f") == best
    assert tried == [("lsq", 2, 0.01, 1), ("lsq", 2, 0.02, 1)]


def test_the_search_ends_where_training_diverges_and_takes_the_smallest_of_equals(arguments, tmp_path, monkeypatch):
    """One standard error of 0.6 with 2400 images is 0.01."""
    curve = {0.1: 0.589, 0.2: 0.591, 0.3: 0.60, 0.4: 0.581, 0.5: 0.579, 0.6: 0.70}
    monkeypatch.setattr(script, "trial", lambda material, trial: {"validation": curve[trial["lr"]]})
    given = [*arguments, "--learning_rates", *(str(rate) for rate in curve), "--validation_images", "2400"]
    (args,) = HfArgumentParser(script.TableArguments).parse_args_into_dataclasses(given)
    runs = Runs(tmp_path / "results", "python some.py")
    assert script.chosen_learning_rate(args, runs, None, "lsq", "f") == 0.2
    assert "lr-lsq-0.5" in stored(tmp_path) and "lr-lsq-0.6" not in stored(tmp_path)


def test_results_of_another_float_model_do_not_mix(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", lambda model, *a, **k: 0.0)
    monkeypatch.setattr(script, "accuracy", lambda *a: 0.5)
    (args,) = HfArgumentParser(script.TableArguments).parse_args_into_dataclasses(arguments)
    runs = Runs(tmp_path / "results", "python some.py")
    images = script.Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    state, fingerprint = script.adapted_float_model(args, runs, images, images)
    stored_model = tmp_path / "cache" / "resnet20-adapted.safetensors"
    stored_model.unlink()  # results from elsewhere: the model is made again
    again, same = script.adapted_float_model(args, runs, images, images)
    assert same == fingerprint and all(torch.equal(again[name], value) for name, value in state.items())
    stored_model.unlink()
    monkeypatch.setattr(script, "train", lambda model, *a, **k: model.linear.bias.data.fill_(1).sum().item())
    with pytest.raises(ValueError, match=f"fingerprint {fingerprint}, which cannot be made here again"):
        script.adapted_float_model(args, runs, images, images)


@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_quantizers_start_from_the_same_weights(name):
    state = CifarResNet(20).state_dict()
    images = script.Images(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    material = script.Material(images, images, images, state)
    model = script.start(material, {"quantizer": name, "bits": 3})
    quantizers = [m for m in model.modules() if isinstance(m, script.Quantizer)]
    assert len(quantizers) == 40
    assert {type(q) for q in quantizers} == {QUANTIZERS[name]}
    assert [q.bits for q in quantizers] == [8, 8] + [3] * 36 + [8, 8]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert state["conv1.weight"].any()  # a run changes nothing of what the next starts from


def test_first_weight_grids_by_hand():
    """All weights of a layer -2, -1, 0 or 1 times one number: LSQ's four levels, without error."""
    state = CifarResNet(20).state_dict()
    for name, value in state.items():
        if value.ndim == 4:
            levels = torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(value.numel() // 4 + 1)
            state[name] = 0.1 * levels[: value.numel()].view_as(value)
    found = script.first_weight_grids(
        script.Material(None, None, None, state), {"quantizers": ["lsq", "liq"], "bits": [2]}
    )
    assert set(found) == {"lsq-2", "liq-2"}
    assert found["lsq-2"]["error"] == pytest.approx(0, abs=1e-6)
    assert found["lsq-2"]["outermost"] == pytest.approx(0.5, abs=0.01)
    assert found["liq-2"]["error"] == pytest.approx(0, abs=1e-3)  # the mean, -1/2, is the middle of its levels


def test_learned_values_have_the_names_of_the_parameters():
    model = torch.nn.Sequential(LSQQuantizer(QuantizerSettings(4, "weight")))
    model[0].path = "layer.weight_quantizer"
    assert script.learned_values(model) == {"layer.weight_quantizer.scale": 1.0}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--quantizers", "lsqq"], r"--quantizers \['lsqq'\]: unknown"),
        (["--validation_images", "24"], r"--validation_images 24: expected 1 to 23"),
    ],
)
def test_mistakes(arguments, extra, message):
    with pytest.raises(ValueError, match=message):
        script.main([*arguments, *extra])


def test_a_stored_run_with_other_arguments(tmp_path):
    runs = Runs(tmp_path, "python some.py")
    runs.once("a", {"steps": 1, "lr": 0.1}, lambda: {"test": 0.5})
    assert runs.once("a", {"steps": 1, "lr": 0.1}, lambda: {"test": 0.6})["outcome"] == {"test": 0.5}
    with pytest.raises(ValueError, match=r"a\.json: .*other arguments, \{'steps': \(1, 2\)\} \(stored, now\)"):
        runs.once("a", {"steps": 2, "lr": 0.1}, lambda: {"test": 0.6})


def test_a_run_that_fails_is_not_stored(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runs(tmp_path, "python some.py").once("a", {}, fail)
    assert not list(tmp_path.iterdir())


def record(kind, name, outcome, **arguments):
    return {
        "name": name,
        "arguments": {"kind": kind, **arguments},
        "outcome": outcome,
        "seconds": 30.0,
        "versions": {"torch": "1"},
        "command": "python benchmarks/quantizer_table.py",
    }


def test_the_page_by_hand(tmp_path):
    """Two seeds of one quantizer: mean and range; a quantizer that is missing at one width: a dash."""
    training = {"lr": 0.01, "steps": 5, "batch_size": 4, "weight_decay": 1e-4}
    adapted = {"test_before": 0.81, "test_after": 0.8512, "training_loss": 0.1, "fingerprint": "f"}
    records = [record("adaptation", "a", adapted, test_images=10000, validation_images=7, **training)]
    for name, bits, seed, test in (("lsq", 4, 0, 0.8), ("lsq", 4, 1, 0.82), ("lsq", 2, 0, 0.7), ("pact", 4, 0, 0.6)):
        outcome = {
            "test": test,
            "test_calibrated": test - 0.3,
            "training_loss": 0.5,
            "learned_values": {"x.weight_quantizer.scale": [2.0, 3.0], "x.activation_quantizer.scale": [1.0, 0.5]},
        }
        own = {"quantizer": name, "bits": bits, "seed": seed, "calibrated_images": 1000, "test_images": 5000}
        records.append(record("run", f"{name}{bits}{seed}", outcome, **own, **training))
    float_run = {"test": 0.86, "test_calibrated": 0.85, "training_loss": 0.1, "learned_values": {}}
    own = {"quantizer": "float", "bits": 32, "seed": 0, "calibrated_images": 1000, "test_images": 5000}
    records.append(record("run", "float", float_run, **own, **training))
    records.append(record("trial", "t", {"validation": 0.9}, quantizer="lsq", bits=2, seed=0, **training))
    fit = {"lsq-4": {"error": 0.02, "outermost": 0.125}, "lsq-2": {"error": 0.18, "outermost": 0.25}}
    records.append(record("grids", "g", fit, quantizers=["lsq"], bits=[4, 2]))
    for entry in records:
        (tmp_path / f"{entry['name']}.json").write_text(json.dumps(entry))
    text = page(tmp_path)
    assert "| quantizer | W4A4 | W2A2 |" in text
    assert "| lsq | 81.0 [80.0, 82.0] (51.0 [50.0, 52.0]) | 70.0 (40.0) |" in text
    assert "| pact | 60.0 (30.0) | - |" in text
    assert "has 81.00% on all 10,000 as it comes and 85.12% after" in text
    assert "to 86.00%: that is what" in text
    assert "standard error of such a figure is at most 0.7 points" in text  # sqrt(0.6 * 0.4 / 5000)
    assert "Seeds: 0, 1." in text
    assert "| lsq | **90.0** |" in text
    assert "| lsq | 0.020 (12.5%) | 0.180 (25.0%) |" in text
    assert "torch 1; the commit" in text
    assert "lsq, pact: the smallest rate" in text.replace("float, ", "")
    assert "Of 8 that moved at all, 0 ended within 5%" in text
    assert "| lsq | 4 | 1.50 1.50 1.50 | 0.50 0.50 0.50 | 0.50 |" in text


def test_a_page_without_results(tmp_path):
    with pytest.raises(ValueError, match="found 0 results; expected one adaptation and at least one run"):
        page(tmp_path)

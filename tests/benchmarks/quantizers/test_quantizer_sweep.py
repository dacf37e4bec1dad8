"""The sweep over quantizers: a whole small run, and going on after an interruption."""

from __future__ import annotations

import json

import pytest
import torch
from generated_cifar import write_split
from transformers import HfArgumentParser

from benchmarks.quantizers import fine_tunes
from benchmarks.quantizers import sweep as script
from benchmarks.shared.cifar_resnet import CifarResNet
from benchmarks.shared.runs import Runs


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
    assert run["command"].startswith("python -m benchmarks.quantizers.sweep --data")
    assert run["seconds"] > 0
    moved = run["outcome"]["learned_values"]["layer2.0.conv1.weight_quantizer.scale"]
    assert moved[0] != moved[1]
    shown = (tmp_path / "document.md").read_text()
    outcome = run["outcome"]
    assert f"| lsq | {100 * outcome['test']:.1f} ({100 * outcome['test_calibrated']:.1f}) |" in shown

    # A restart trains nothing anew; after one result is lost, it trains that one, and gets the same again.
    trained = []
    original = script.train
    for module in (script, fine_tunes):  # the adaptation, and everything else
        monkeypatch.setattr(module, "train", lambda *a, **k: trained.append(a) or original(*a, **k))
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

"""The loop without Trainer: one small run in this process, one in two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import run_python
from transformers import AutoModelForImageClassification

from hf_saq.layers import PackedLayer

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import run_image_classification_no_trainer as script  # noqa: E402

SMALL = [
    "--float_epochs=1",
    "--num_train_epochs=1",
    "--max_train_steps=2",
    "--max_train_samples=150",
    "--max_eval_samples=50",
    "--per_device_train_batch_size=16",
]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps what the first Accelerator of a process was given."""
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


def test_a_run(tmp_path, monkeypatch):
    passes = {"ascent": 0, "perturbed": 0}
    for name in passes:
        original = getattr(script.SharpnessAwareMinimizer, name)

        def counted(self, name=name, original=original):
            passes[name] += 1
            return original(self)

        monkeypatch.setattr(script.SharpnessAwareMinimizer, name, counted)
    results = script.main([*SMALL, f"--output_dir={tmp_path}"])
    assert results["quantized"] == results["reloaded"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert passes == {"ascent": 4, "perturbed": 4}  # two optimizer steps of two micro-batches
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert any(isinstance(module, PackedLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate=1"], "error: --lerning_rate is no argument; did you mean --learning_rate?"),
        (["--learning=1"], "error: --learning is no argument;"),  # no abbreviation
        (["--rho=much"], "error: argument --rho: invalid float value: 'much'"),
        (["--weight_bits=9"], "error while reading the arguments: SAQQuantizationConfig.weight_bits=9"),
        (["--model_name_or_path=./none"], "--model_name_or_path './none': there is no such directory."),
        (
            ["--max_train_samples=9"],
            "error: 9 training images do not fill one batch of --per_device_train_batch_size 32",
        ),
        (["--train_dir=none"], "error while loading the images: --train_dir 'none': there is no such directory."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    said = capsys.readouterr().err if stopped.value.code == 2 else f"{stopped.value}\n"
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_two_processes(tmp_path):
    script_of_two = EXAMPLES / "run_image_classification_no_trainer.py"
    done = run_python(script_of_two, *SMALL, f"--output_dir={tmp_path}", processes=2)
    assert done.stdout.count("W4A4") == 1  # the two knew of each other
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["quantized"] == results["reloaded"]


@pytest.mark.slow
def test_the_second_pass_changes_the_result(tmp_path):
    """Radius 0 is plain quantization-aware training."""
    states = {}
    for rho in ("0", "0.5"):
        output = tmp_path / rho
        script.main([*SMALL, "--float_epochs=0", f"--rho={rho}", f"--output_dir={output}"])
        states[rho] = AutoModelForImageClassification.from_pretrained(output).state_dict()
    assert not torch.equal(states["0"]["vit.layernorm.weight"], states["0.5"]["vit.layernorm.weight"])

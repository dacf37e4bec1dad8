"""The arguments of the example script: files, defaults, help, and mistakes, which are answered in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_saq import SAQConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from image_arguments import DIGITS_DEFAULTS, make_parser, parse_arguments, resume_choice  # noqa: E402


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_one_file_of_arguments(kind, tmp_path):
    given = {"rho": 0.25, "weight_bits": [3], "methods": ["saq"], "output_dir": str(tmp_path), "use_cpu": True}
    path = tmp_path / f"arguments.{kind}"
    path.write_text(yaml.safe_dump(given) if kind == "yaml" else json.dumps(given))
    _, data, training, saq, quantization = parse_arguments([str(path)])
    assert data.is_digits and saq.rho == 0.25 and quantization.weight_bits == [3]
    assert training.learning_rate == DIGITS_DEFAULTS["learning_rate"]


@pytest.mark.parametrize("preset", ["full", "balanced", "last_layers", "free"])
def test_schedule_of_the_command_line_takes_the_place_of_all_knobs(preset, tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text("interval: 1\nascent_fraction: 0.5\n")
    expected = SAQConfig(schedule=preset).perturbation_schedule()
    for arguments in ([f"--schedule={preset}"], [str(path), "--schedule", preset]):
        assert parse_arguments(arguments)[3].perturbation_schedule() == expected
    assert parse_arguments([str(path), "--interval=2"])[3].ascent_fraction == 0.5  # a knob goes with the others


def test_the_command_line_overrides_the_digits_defaults():
    _, _, training, saq, quantization = parse_arguments(["--learning_rate=0.5", "--rho=0.7"])
    assert training.learning_rate == 0.5 and saq.rho == 0.7 and quantization.weight_bits == [4, 2]


@pytest.mark.parametrize("given", [["--dataset_name=x"], ["--dataset-name", "x"], ["--train_dir", "x"]], ids=str)
def test_other_data_does_not_get_the_digits_defaults(given):
    _, _, training, saq, quantization = parse_arguments([*given, "--do_train"])
    assert saq.rho is None and quantization.float_epochs == 0 and training.num_train_epochs == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight_bits", "9"], "weight_bits=9"),
        (["--weight_bits", "4", "--activation_bits", "4", "4"], "expected as many as --weight_bits"),
        (["--weight_bits", "4", "4"], "--weight_bits (and --activation_bits) [(4, 4), (4, 4)]: one of them is there"),
        (["--methods", "qat", "saq", "qat"], "--methods ['qat', 'saq', 'qat']: one of them is there twice"),
        (["--do_train", "--do_predict"], "--do_predict: this script writes no predictions"),
        (["--quantizer", "magic"], "'magic' is unknown"),
        (["--rho", "-1"], "rho=-1"),
        (["--methods", "sam"], "--methods"),
        (["--dataset_name", "x", "--train_dir", "y"], "exclude each other"),
        (["--augmentation", "all"], "--augmentation"),
        (["missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--lerning_rate", "0.1"], "--lerning_rate is no argument; did you mean --learning_rate?"),
        (["--lerning-rate=0.1"], "--lerning-rate is no argument; did you mean --learning_rate?"),
        (["--dataset", "x", "--do_train"], "--dataset is no argument; "),  # no abbreviation of --dataset_name
        (["--zzz"], "--zzz is no argument; --help lists what there is."),
        (["--rho", "0.1", "more.yaml"], "'more.yaml' belongs to no argument; a file of arguments"),
        (["--rho", "much"], "argument --rho: invalid float value: 'much'"),
        (["--quantization_overrides", "{x"], "--quantization_overrides '{x' is not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, message, capsys):
    assert message in one_line(arguments, capsys)


def one_line(arguments, capsys) -> str:
    """What is said of wrong arguments."""
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and ": error: " in err
    return err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rho: [0.1\nlearning_rate: 1", "is neither YAML nor JSON: while parsing a flow sequence"),
        ("- rho\n- 0.1\n", "holds a list; expected one argument and value a line."),
        ("", "holds a NoneType; expected one argument and value a line."),
        ("lerning_rate: 0.1", "'lerning_rate' is no argument; did you mean 'learning_rate'?"),
        ("rho: much", "argument --rho: invalid float value: 'much'"),
    ],
)
def test_a_broken_file_of_arguments_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "arguments.yaml"
    path.write_text(text)
    assert message in one_line([path], capsys)


def test_one_value_in_a_file_is_a_list_of_one(tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text("weight_bits: 3\nmethods: saq\nuse_cpu: true\n")
    _, _, _, _, quantization = parse_arguments([str(path)])
    assert quantization.weight_bits == [3] and quantization.methods == ["saq"]


def test_help_has_groups_and_the_true_defaults():
    """Those of the classes; what the handwritten digits get in place of them is a list of its own."""
    shown, _, demo = " ".join(make_parser("").format_help().split()).partition("Without a data set")
    order = [
        "model: what",
        "data: images",
        "quantization: what is compared",
        "perturbation: hf_saq",
        "training: trans",
    ]
    assert [shown.index(name) for name in order] == sorted(shown.index(name) for name in order)
    for flag, default in (
        ("float_epochs", "0.0"),
        ("num_train_epochs", "3.0"),
        ("rho", "None"),
        ("weight_bits", r"\[4\]"),
    ):
        assert re.search(rf"--{flag} {flag.upper()}.*?\(default: {default}\)", shown), flag
    for name, value in DIGITS_DEFAULTS.items():
        assert f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value} " in demo + " ", name


def finished_checkpoint(directory: Path) -> Path:
    """As far as `what_is_missing` looks."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "trainer_state.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("given", "expected"), [("true", True), ("True", True), (True, True), ("false", None), (False, None), (None, None)]
)
def test_resume_is_true_or_false(given, expected):
    assert resume_choice(given) is expected


def test_resume_is_a_path(tmp_path, capsys):
    path = finished_checkpoint(tmp_path / "saq-w4a4" / "checkpoint-3")
    _, _, training, _, _ = parse_arguments([f"--resume_from_checkpoint={path}", "--use_cpu"])
    assert training.resume_from_checkpoint == str(path)
    (path / "trainer_state.json").unlink()
    said = one_line([f"--resume_from_checkpoint={path}"], capsys)
    assert "trainer_state.json is missing" in said and "true (the newest complete one of each stage) or false" in said
    said = one_line(["--resume_from_checkpoint=nowhere"], capsys)
    assert "--resume_from_checkpoint 'nowhere': it is not a directory. Expected the path of a checkpoint-N" in said

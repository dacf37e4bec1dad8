"""Every recipe: its arguments are known, and two steps of it run, with a tiny model on generated images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recipe_data import BREEDS, SIZE, generated_data, tiny_checkpoint
from recipe_table import README, RECIPES, cost_class, table

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402

EVERY_TIME = (
    "imagenet1k_resnet18 imagenet1k_mobilenet_v2 imagenet1k_vit_small imagenet1k_swin_tiny cifar100_resnet20 "
    "cifar10_mobilenet_v2 flowers102_vit_base pets_convnext_tiny"
).split()
"""Every kind of model and every data set; the others run with the slow tests."""

SOURCED = (
    "augmentation weight_bits quantizer weight_granularity first_last_bits rho scale_lr_ratio float_epochs "
    "float_learning_rate optim optim_args learning_rate lr_scheduler_type num_train_epochs warmup_steps weight_decay "
    "label_smoothing_factor max_grad_norm per_device_train_batch_size image_size distill_alpha"
).split()
"""What needs a comment that says where its value comes from."""


def each_recipe(some_are_slow: bool):
    marks = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize(
        "path", [pytest.param(p, id=p.stem, marks=marks[p.stem in EVERY_TIME or not some_are_slow]) for p in RECIPES]
    )


@each_recipe(some_are_slow=False)
def test_every_argument_arrives(path):
    """All names are known, and every value is what the file says, in the type of its argument."""
    given = yaml.safe_load(path.read_text())
    parsed: dict = {}
    for arguments in script.parse_arguments([str(path), "--use_cpu"]):
        parsed |= vars(arguments)
    for name, value in given.items():
        found = parsed[name]
        if name == "report_to":
            value = [] if value == "none" else value  # as `TrainingArguments` turns it
        assert getattr(found, "value", found) == value, name
        if isinstance(found, float):
            assert isinstance(value, (int, float)), f"{name}: YAML reads {value!r} as text"
    assert given["output_dir"] == f"outputs/recipes/{path.stem}"


@each_recipe(some_are_slow=False)
def test_sources_and_cost_are_named(path):
    text = path.read_text()
    recipe = yaml.safe_load(text)
    for line in text.splitlines():
        name = line.split(":")[0]
        assert name not in SOURCED or " # " in line, line
    assert text.startswith("# ") and f"\n# Cost class: {cost_class(recipe)} " in text


def test_the_table_is_that_of_the_files():
    assert table() in README.read_text()


@each_recipe(some_are_slow=True)
def test_two_steps(path, tmp_path, monkeypatch):
    recipe = yaml.safe_load(path.read_text())
    trainers = []

    class Kept(script.ImageTrainer):
        def train(self, *args, **kwargs):
            trainers.append(self)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(script, "ImageTrainer", Kept)
    bits = min(recipe["weight_bits"])
    changes = {
        "model_name_or_path": tiny_checkpoint(recipe["model_name_or_path"], tmp_path / "model"),
        "dataset_name": generated_data(recipe["dataset_name"], tmp_path / "data"),
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "image_size": SIZE,
        "weight_bits": bits,
        "methods": "saq",
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": "false",
        "dataloader_pin_memory": "false",
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "bf16": "false",
        "use_cpu": "true",
    }
    rows = script.main([str(path), *(f"--{name}={value}" for name, value in changes.items())])
    assert [row.bits for row in rows] == ["W32A32", f"W{bits}A{bits}"]
    assert rows[1].reloaded_top1 == rows[1].top1
    trainer = trainers[-1]  # that of the quantized stage; the float stage comes first
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(np.isfinite(entry["loss"]) and entry["ascent_norm"] > 0 for entry in logs)
    assert trainer.state.global_step == 2 and trainer.model.config.num_labels == BREEDS.num_classes
    assert len(trainer.eval_dataset) == 6
    assert trainer.eval_dataset[0]["pixel_values"].shape == (3, SIZE, SIZE)
    # What the recipe asks for has reached the optimizer, the quantizers and the perturbation.
    groups = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD if recipe["optim"] == "sgd" else torch.optim.AdamW)
    assert {group["weight_decay"] for group in groups} == {recipe["weight_decay"], 0.0}
    rates = {group["initial_lr"] for group in groups}
    expected = recipe["learning_rate"] * np.array([1, recipe["scale_lr_ratio"]])
    assert np.allclose(sorted(rates), sorted(set(expected)), rtol=1e-12)
    if recipe["optim"] == "sgd":
        assert {group["momentum"] for group in groups} == {0.9}
    assert trainer.minimizer.rho == recipe["rho"]
    config = trainer.model.config.quantization_config
    for name in ("quantizer", "weight_granularity", "first_last_bits"):
        assert getattr(config, name) == recipe[name]


def test_a_typo_in_a_recipe(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPES[0].read_text().replace("\nrho:", "\nrhoo:"))
    with pytest.raises(SystemExit):
        script.parse_arguments([str(path)])
    assert f"{path}: 'rhoo' is no argument; did you mean 'rho'?" in capsys.readouterr().err


def test_the_command_line_wins_over_the_file():
    path = RECIPES[0]
    _, data, training, saq, quantization = script.parse_arguments(
        [str(path), "--use_cpu", "--rho=0.7", "--weight_bits", "5", "6", "--dataset_name=elsewhere"]
    )
    assert (saq.rho, quantization.weight_bits, data.dataset_name) == (0.7, [5, 6], "elsewhere")
    assert training.num_train_epochs == yaml.safe_load(path.read_text())["num_train_epochs"]

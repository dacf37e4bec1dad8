"""Every recipe: its arguments are known, and two steps of it run, with a tiny model on generated images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from recipe_table import README, RECIPES, cost_class, table
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402

SIZE = 32
"""Of the tiny models' images, in pixels."""

TINY = {
    "microsoft/resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"
    ),
    "google/mobilenet_v2": lambda: MobileNetV2Config(
        depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, expand_ratio=2, image_size=SIZE
    ),
    "google/vit": lambda: tiny_vit(),
    "facebook/deit": lambda: tiny_vit(),  # these checkpoints are stored as ViT
    "facebook/convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "microsoft/swin": lambda: SwinConfig(
        image_size=SIZE, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, patch_size=4
    ),
    "timm/vit_small": lambda: tiny_timm("vit_small_patch16_224", img_size=SIZE, embed_dim=32, depth=1, num_heads=2),
    "timm/mobilenetv2": lambda: tiny_timm("mobilenetv2_035"),
}
"""Start of a model's name on the Hub -> the configuration that stands for it."""

BREEDS, KINDS = ClassLabel(names=["a", "b", "c"]), ClassLabel(names=["cat", "dog"])
COLUMNS = {
    "ILSVRC/imagenet-1k": {"image": Image(), "label": BREEDS},
    "uoft-cs/cifar10": {"img": Image(), "label": BREEDS},
    "uoft-cs/cifar100": {"img": Image(), "fine_label": BREEDS, "coarse_label": KINDS},
    "dpdl-benchmark/oxford_flowers102": {"image": Image(), "label": BREEDS},
    "timm/oxford-iiit-pet": {"image": Image(), "label": BREEDS, "image_id": Value("string"), "label_cat_dog": KINDS},
}
SPLITS = {
    "ILSVRC/imagenet-1k": ("train", "validation", "test"),
    "uoft-cs/cifar10": ("train", "test"),
    "uoft-cs/cifar100": ("train", "test"),
    "dpdl-benchmark/oxford_flowers102": ("train", "validation", "test"),
    "timm/oxford-iiit-pet": ("train", "test"),
}
"""As on the Hub, with fewer classes and images."""

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


def tiny_vit() -> ViTConfig:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return ViTConfig(**sizes, image_size=SIZE, patch_size=16)


def tiny_timm(architecture: str, **model_args) -> TimmWrapperConfig:
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    return TimmWrapperConfig(
        architecture=architecture,
        model_args=model_args,
        pretrained_cfg={"input_size": [3, 224, 224], **normalization},
    )


def tiny_checkpoint(name: str, directory: Path) -> Path:
    """What stands for `name` on the Hub: another number of classes, so that the head is made anew."""
    (build,) = (build for start, build in TINY.items() if name.startswith(start))
    config = build()
    config.num_labels = 5
    config.initializer_range = 0.2  # with 0.02 so narrow a model hardly depends on its input
    model = AutoModelForImageClassification.from_config(config)
    settle_statistics(model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def settle_statistics(model: torch.nn.Module) -> None:
    """Batch norms as in a trained model: with the statistics of their inputs, not those they are born with."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    model.train()
    model(pixel_values=torch.randn(16, 3, SIZE, SIZE))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def generated_data(name: str, directory: Path) -> Path:
    """A directory of parquet files with the splits and columns of data set `name`."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    for split in SPLITS[name]:
        count = 16 if split == "train" else 6
        values: dict[str, list] = {}
        for column, feature in COLUMNS[name].items():
            if isinstance(feature, ClassLabel):
                values[column] = [i % feature.num_classes for i in range(count)]
            elif isinstance(feature, Image):
                values[column] = list(rng.integers(0, 256, (count, 40, 48, 3), dtype=np.uint8))
            else:
                values[column] = [str(i) for i in range(count)]
        Dataset.from_dict(values, features=Features(COLUMNS[name])).to_parquet(
            directory / f"{split}-00000-of-00001.parquet"
        )
    return directory


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

    class Kept(script.DistillationTrainer):
        def train(self, *args, **kwargs):
            trainers.append(self)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(script, "DistillationTrainer", Kept)
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
    (trainer,) = trainers
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

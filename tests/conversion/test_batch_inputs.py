"""Batches that do not fit the model: what came, what is expected, in `calibrate` and in `SAQTrainer`."""

from __future__ import annotations

from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import images, vit
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from training import Images, arguments, make_trainer

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, quantize, reestimate_batch_norm
from hf_saq.conversion.observing import check_keys, check_positions

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=4, scale_init="mean")


class Plain(nn.Module):
    """One layer, without `**kwargs`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        return self.layer(x) * scale


@pytest.mark.parametrize(
    ("build", "batch", "message"),
    [
        (
            vit,
            {"image": images(2), "labels": torch.zeros(2, dtype=torch.long)},
            r"`batches`: a batch with the keys 'image', 'labels' lacks 'pixel_values'\. ViTForImageClassification "
            r"takes 'pixel_values', .*images are usually 'pixel_values'",
        ),
        (
            Plain,
            {"pixel_values": torch.ones(1, 4)},
            r"the keys 'pixel_values' lacks 'x'\. Plain takes 'x', 'scale'",
        ),
        (
            Plain,
            {"x": torch.ones(1, 4), "label": 1},
            r"'x', 'label' has 'label', which the model does not take\. Plain",
        ),
    ],
    ids=["transformers", "missing", "unknown"],
)
def test_calibrate_says_which_keys_came(build, batch, message):
    model = quantize(build(), CONFIG.replace(first_last_bits=None))
    with pytest.raises(ValueError, match=message):
        calibrate(model, [batch])


class Masked(Plain):
    def forward(self, x, attn_mask=None):
        return self.layer(x)


LOADER = [(images(2)[:, 0, 0, :4], torch.tensor([0, 1]))]
"""Batches as a data loader of images and labels gives them."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
            r"`batches`: a batch of 2 values has more values than the model has inputs\. Sequential takes 'input', in "
            r"this order\. Pass the images alone: `\(images for images, labels in loader\)`\.",
        ),
        (
            Masked(),
            r"a batch of 2 values has class indices for 'attn_mask'\. Masked takes 'x', 'attn_mask'.* alone",
        ),
    ],
    ids=["one input", "a mask"],
)
def test_labels_are_no_input(model, message):
    quantized = quantize(model, CONFIG.replace(first_last_bits=None))
    with pytest.raises(ValueError, match=message):
        calibrate(quantized, LOADER)
    assert calibrate(quantized, (images for images, labels in LOADER)) is quantized
    if isinstance(model, nn.Sequential):
        with pytest.raises(ValueError, match=message):
            reestimate_batch_norm(quantized, LOADER)


def test_positions_that_fit_are_let_through():
    check_positions(Plain(), (torch.ones(1, 4), 2.0), "test")
    check_positions(Masked(), (torch.ones(2, 4), torch.ones(2, 2, dtype=torch.bool)), "test")
    check_positions(Masked(), (torch.ones(2, 4), torch.ones(2, dtype=torch.bool)), "test")
    check_positions(vit(), (images(2), torch.zeros(2, dtype=torch.long)), "test")  # its second input is `labels`
    check_positions(nn.DataParallel(Plain()), LOADER[0], "test")  # it passes on what it gets


def test_too_many_inputs_that_are_no_labels():
    with pytest.raises(
        ValueError, match=r"a batch of 3 values has more .* Plain takes 'x', 'scale'.* its inputs alone\."
    ):
        check_positions(Plain(), (torch.ones(1, 4), 2.0, torch.ones(1, 4)), "test")


def test_what_fits_is_let_through():
    check_keys(vit(), {"pixel_values": images(2)}, "test")
    check_keys(vit(), {"pixel_values": images(2), "labels": 0, "own": 0}, "test")  # it has `**kwargs`
    check_keys(Plain(), {"x": 1, "scale": 2.0}, "test")
    check_keys(nn.Sequential(Plain()), {"input": 1}, "test")
    check_keys(nn.DataParallel(Plain()), {"x": 1}, "test")  # it passes on what it gets


class Renamed(Images):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {"image": row["pixel_values"], "labels": row["labels"]}


def test_the_trainer_says_which_keys_came(tmp_path):
    """When it calibrates, when it trains a calibrated model, and when it evaluates."""
    message = (
        r"SAQTrainer: a batch with the keys 'image', 'labels' lacks 'pixel_values'\. ViTForImageClassification takes"
    )
    data = Renamed(8, torch.float32)
    trainer = SAQTrainer(
        quantize(vit(), CONFIG), arguments(tmp_path), saq_config=SAQConfig(rho=0.1), train_dataset=data
    )
    for use in (trainer.train, lambda: trainer.evaluate(data)):
        with pytest.raises(ValueError, match=message):
            use()
    trained = make_trainer("vit", 3, 1, "local", tmp_path, cls=SAQTrainer)
    trained.train_dataset = Renamed(8)
    with pytest.raises(ValueError, match=message):
        trained.train()


class WrongClass(Images):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"labels": 7 if index == 3 else -100}


def test_the_trainer_says_which_label_the_model_has_not(tmp_path):
    """In training and in evaluation; a label that losses leave out is none."""
    trainer = make_trainer("vit", 3, 1, "local", tmp_path, cls=SAQTrainer)
    trainer.train_dataset = WrongClass(8)
    message = r"SAQTrainer: a batch has the label 7; the model has 3 classes and expects 0 to 2\. Build it with num_l"
    for use in (trainer.train, lambda: trainer.evaluate(trainer.train_dataset)):
        with pytest.raises(ValueError, match=message):
            use()


def with_many_classes() -> datasets.Dataset:
    features = datasets.Features({"pixel_values": datasets.Array3D((3, 16, 16), "float32")})
    features["label"] = datasets.ClassLabel(names=[f"flower {k}" for k in range(5)])
    return datasets.Dataset.from_dict({"pixel_values": images(4).numpy(), "label": [0, 1, 4, 0]}, features=features)


def test_the_trainer_says_when_a_data_set_has_more_classes(tmp_path):
    """Before anything is computed."""
    many = with_many_classes()
    trainer = make_trainer("vit", 3, 1, "local", tmp_path, cls=SAQTrainer)
    trainer.train_dataset = many
    message = r"the \w+ data set has 5 classes in 'label' and labels up to 4; the model has 3 .* num_labels=5"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(many)
    few = many.filter(lambda row: row["label"] < 3).rename_column("label", "labels")  # it has five names still
    assert trainer.evaluate(few.with_format("torch"))["eval_loss"] > 0


@pytest.mark.parametrize("where", ["transform", "collator"])
@pytest.mark.parametrize("last", [2, 3])
def test_labels_that_are_made_of_those_of_a_data_set(where, last, tmp_path):
    """One flower against all others, say: the columns have more classes than the model, its batches have not."""

    def merged(rows: dict) -> dict:
        labels = [min(int(label), last) for label in rows["label"]]
        return {"pixel_values": torch.tensor(np.array(rows["pixel_values"])), "labels": labels}

    def collated(rows: list[dict]) -> dict:
        made = merged({name: [row[name] for row in rows] for name in rows[0]})
        return {**made, "labels": torch.tensor(made["labels"])}

    data, collator = with_many_classes(), None
    if where == "transform":
        data = data.with_transform(merged)
    else:
        collator = collated
    trainer = SAQTrainer(vit(), arguments(tmp_path), saq_config=SAQConfig(case=None), data_collator=collator)
    expected = pytest.raises(ValueError, match="labels up to 4; the model has 3") if last == 3 else nullcontext()
    with expected:
        assert trainer.evaluate(data)["eval_loss"] > 0


@pytest.mark.parametrize("names", [["tulip", "daisy", "rose"], ["rose", "tulip"], ["daisy", "rose"], ["daisy", "oak"]])
@pytest.mark.parametrize("renumbers", [False, True])
def test_classes_of_the_model_in_another_order(names, renumbers, tmp_path):
    """A model that was fine-tuned on these classes, and images in folders, whose order is that of their names: it
    learned to call each class by the name of another. A transform may give the model its own numbers."""
    model = vit()
    model.config.id2label = dict(enumerate(["daisy", "rose", "tulip"]))
    features = datasets.Features({"pixel_values": datasets.Array3D((3, 16, 16), "float32")})
    features["label"] = datasets.ClassLabel(names=names)
    data = datasets.Dataset.from_dict({"pixel_values": images(4).numpy(), "label": [1, 1, 0, 1]}, features=features)
    own = {name: k for k, name in model.config.id2label.items()}
    if renumbers:
        data = data.with_transform(
            lambda rows: {
                "pixel_values": torch.tensor(np.array(rows["pixel_values"])),
                "labels": [own.get(names[k], k) for k in rows["label"]],
            }
        )
    trainer = SAQTrainer(model, arguments(tmp_path), saq_config=SAQConfig(case=None))
    is_refused = names[0] != "daisy" and not renumbers
    message = rf"numbers classes of the model otherwise: '{names[0]}' is 0 in 'label', and {own[names[0]]} in the"
    with pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        trainer.evaluate(data if renumbers else data.with_format("torch"))


def folders(tmp_path, names: list[str], target_transform=None) -> ImageFolder:
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(np.full((16, 16, 3), 50 * k, np.uint8)).save(tmp_path / name / f"{k}.png")
    return ImageFolder(tmp_path, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]), target_transform)


def of_pairs(pairs: list) -> dict:
    return {"pixel_values": torch.stack([x for x, _ in pairs]), "labels": torch.tensor([y for _, y in pairs])}


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("own", [["daisy", "rose", "tulip"], ["tulip", "rose", "daisy"], ["a", "b", "c"]])
@pytest.mark.parametrize("renumbers", [False, True])
def test_folders_of_torchvision_in_another_order(part, own, renumbers, tmp_path):
    """They are numbered in the order of their names; a model has the order that it was trained in."""
    model = vit()
    model.config.id2label = dict(enumerate(own))
    numbers = {name: k for k, name in enumerate(own)}
    names = ["daisy", "rose", "tulip"]
    data = folders(tmp_path / "images", names, (lambda k: numbers.get(names[k], k)) if renumbers else None)
    trainer = SAQTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        saq_config=SAQConfig(case=None),
        data_collator=of_pairs,
        train_dataset=Subset(data, [5, 0, 3]) if part else data,
    )
    message = r"raining data set numbers classes of the model otherwise: 'daisy' is 0 in `classes`, and 2 in the model"
    is_refused = own[0] == "tulip" and not renumbers
    with pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        trainer.train()


def test_folders_of_torchvision_with_more_classes(tmp_path):
    data = folders(tmp_path / "images", [f"flower {k}" for k in range(4)])
    trainer = SAQTrainer(vit(), arguments(tmp_path), saq_config=SAQConfig(case=None), data_collator=of_pairs)
    with pytest.raises(ValueError, match="has 4 classes in `classes` and labels up to 3; the model has 3 classes"):
        trainer.evaluate(data)


def test_a_loss_function_takes_labels_that_the_model_does_not(tmp_path):
    model = quantize(Plain(), CONFIG.replace(first_last_bits=None))
    data = [{"x": torch.randn(4), "labels": k % 2} for k in range(8)]
    trainer = SAQTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        train_dataset=data,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: nn.functional.cross_entropy(
            outputs, labels
        ),
    )
    trainer.train()
    assert trainer.state.global_step == 1

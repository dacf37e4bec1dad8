"""`hf-saq eval`, `compare` and `analyze` on models of other types, heads and classes than a plain float32 ViT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_looking import batch_of, on, run
from tiny_models import deit_with_teacher, resnet, timm_efficientnet, vit
from torch import nn
from transformers import ViTImageProcessor
from transformers.utils import import_utils

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize, unpack
from hf_saq.analysis import sharpness
from hf_saq.cli import saved_images
from hf_saq.storage.saved_directory import load_any_saved

SIZE = 16
NUMBERS = {0: "cat", 1: "ant", 2: "bee"}


def save(model, directory: Path, classes=NUMBERS) -> Path:
    """A model and its processor, with classes numbered in another order than the data's."""
    model.config.id2label, model.config.label2id = classes, {name: number for number, name in classes.items()}
    model.save_pretrained(directory)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        directory
    )
    return directory


def quantized(model):
    return calibrate(quantize(model, SAQQuantizationConfig(weight_bits=4, activation_bits=4)), [batch_of_noise()])


def batch_of_noise() -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A ResNet in bfloat16: `float`, `packed`, and `full`, the packed one in float32."""
    directory = tmp_path_factory.mktemp("half")
    save(nn.Module.bfloat16(resnet()), directory / "float")
    packed = pack(quantized(resnet()))
    save(packed, directory / "full")
    save(nn.Module.bfloat16(packed), directory / "packed")
    return directory


def test_eval_runs_a_model_in_the_type_it_was_stored_in(half, images, capsys):
    model, batch = load_any_saved(str(half / "packed"))[0], batch_of(images)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(batch["pixel_values"].bfloat16()).logits.float()
    status, out, _ = run(capsys, "eval", half / "packed", *on(images), "--json")
    assert status == 0
    assert json.loads(out)["loss"] == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), abs=2e-3)


def test_models_of_two_types_are_compared(half, images, capsys):
    status, out, _ = run(capsys, "compare", half / "full", half / "float", *on(images), "--json")
    assert status == 0 and json.loads(out)["examples"] == 12


def test_analyses_are_in_float32(half, images, capsys, tmp_path):
    """In bfloat16, a perturbation of a small radius would vanish in the rounding of the weights."""
    argv = ("analyze", half / "packed", *on(images), "--output", tmp_path / "page.html", "--json", "--parts")
    status, out, _ = run(capsys, *argv, "sharpness", "--rho", 1e-3)
    found = json.loads(out)["Sharpness of packed"]
    batch = batch_of(images)
    batches = [{name: value[i : i + 5] for name, value in batch.items()} for i in (0, 5, 10)]
    model = nn.Module.float(unpack(load_any_saved(str(half / "packed"))[0]))
    alone = sharpness(model, batches, 1e-3, progress=False)
    assert status == 0 and found["steepest"]["mean"] == pytest.approx(alone.steepest.mean, rel=1e-3)
    status, out, _ = run(capsys, *argv, "sensitivity", "--passes", 2, "--float", half / "float")
    assert status == 0 and json.loads(out)["Sensitivity of the layers of float"]["entries"]


def test_a_classifier_that_computes_no_loss(images, capsys, tmp_path):
    """DeiT with a teacher takes no labels: the loss is then the cross-entropy of its logits."""
    plain = save(deit_with_teacher(), tmp_path / "float")
    packed = save(pack(quantized(deit_with_teacher())), tmp_path / "packed")
    model, batch = load_any_saved(str(packed))[0], batch_of(images)
    with torch.no_grad():
        expected = F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).item()
    status, out, _ = run(capsys, "eval", packed, *on(images), "--json")
    assert status == 0 and json.loads(out)["loss"] == pytest.approx(expected, rel=1e-4)
    status, out, _ = run(capsys, "compare", plain, packed, *on(images), "--json")
    assert status == 0 and json.loads(out)["loss_b"] == pytest.approx(expected, rel=1e-4)
    page = ("--output", tmp_path / "page.html", "--json", "--points", 3, "--passes", 1)
    status, out, _ = run(capsys, "analyze", packed, *on(images), *page)
    assert status == 0 and json.loads(out)["Landscape along a line"]


@pytest.mark.parametrize("every", [True, False])
def test_a_diverged_model_has_no_accuracy(every, images, capsys, tmp_path):
    """Sorting would give scores that are NaN to some class. One image without is enough for no number at all."""
    model = vit()
    with torch.no_grad():  # of two inputs, those of different signs add up to inf - inf
        model.classifier.weight[1, :2] = float("nan" if every else "inf")
    save(model, tmp_path / "diverged")
    with torch.no_grad():
        without = int(model(batch_of(images)["pixel_values"]).logits.isnan().any(1).sum())
    assert without == 12 if every else 0 < without < 12
    status, out, _ = run(capsys, "eval", tmp_path / "diverged", *on(images), "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert status == 0 and (found["top1"], found["top5"], found["loss"]) == (None, None, None)
    assert found["images_with_nan_scores"] == without
    out = run(capsys, "eval", tmp_path / "diverged", *on(images))[1]
    assert f"scores that are NaN to {without} of 12 images, so it has no accuracy" in out


def test_numbers_of_classes_with_gaps_are_named(images, capsys, tmp_path):
    directory = save(vit(), tmp_path / "gaps", {0: "cat", 2: "ant", 7: "bee"})
    status, out, err = run(capsys, "eval", directory, *on(images))
    assert (status, out) == (1, "") and "numbers its 3 classes 0, 2, 7 in id2label; expected 0 to 2" in err


def test_a_card_of_classes_that_are_numbers(capsys, tmp_path):
    directory = save(quantized(vit()), tmp_path / "numbers", {0: 4, 1: 5, 2: 6})
    assert run(capsys, "card", directory)[0] == 0
    assert "## Classes\n\n4, 5, 6\n" in (directory / "README.md").read_text()


@pytest.mark.parametrize("command", ["inspect", "pack", "eval"])
def test_a_missing_library_is_no_damage(command, images, capsys, tmp_path, monkeypatch):
    """Of a timm model transformers says itself how to install timm."""
    quantize(timm_efficientnet(), SAQQuantizationConfig()).save_pretrained(tmp_path / "timm")
    more = {"inspect": (), "pack": (tmp_path / "out",), "eval": on(images)}[command]
    backend = import_utils.BACKENDS_MAPPING["timm"]
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, backend[1]))
    status, out, err = run(capsys, command, tmp_path / "timm", *more)
    assert (status, out) == (1, "") and "requires the timm library" in err and "pip install timm" in err
    assert "damaged" not in err


def test_digits_without_scikit_learn(saved, capsys, monkeypatch):
    find_spec = saved_images.find_spec
    monkeypatch.setattr(saved_images, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    status, _, err = run(capsys, "eval", saved / "packed", "--data", "digits")
    assert status == 1 and "sklearn must be installed to read images: pip install" in err and "[data]" in err

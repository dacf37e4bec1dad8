"""`--do_eval` without `--do_train`: the model keeps its classes, and images are numbered as it numbers them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402

COLOURS = {"cat": 0, "dog": 1, "eel": 2}
"""Class -> the channel that is bright in its images."""


def folders(root: Path, names, count: int = 3) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[..., COLOURS.get(name, 0)] = 255
        for k in range(count):
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def sees_colours(names: list[str], directory: Path, form: str) -> Path:
    """A ViT that was made, not trained, to tell the bright channel: its class at the place that `names` gives it."""
    config = ViTConfig(
        image_size=8, patch_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures = torch.full((3, 3, 8, 8), -1.0)
    for channel in range(3):
        pictures[channel, channel] = 1.0
    with torch.no_grad():
        features = model.vit(pictures).last_hidden_state[:, 0]
        # Answer with the class whose picture has the nearest features.
        centres = torch.stack([features[COLOURS[name]] for name in names])
        model.classifier.weight.copy_(1e4 * centres)
        model.classifier.bias.copy_(-0.5e4 * centres.square().sum(dim=1))
        assert [names[k] for k in model(pictures).logits.argmax(dim=1).tolist()] == list(COLOURS)
    if form == "packed":
        quantize(
            model, SAQQuantizationConfig(weight_bits=8, activation_bits=None, modules_to_not_convert=["classifier"])
        )
        calibrate(model, [{"pixel_values": pictures}])
        model = pack(model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def accuracy(model: Path, images: Path, out: Path) -> float:
    given = [f"--model_name_or_path={model}", f"--validation_dir={images}", f"--output_dir={out}", "--do_eval"]
    (row,) = script.main([*given, "--use_cpu", "--report_to=none", "--augmentation=none", "--disable_tqdm=true"])
    return row.top1


@pytest.mark.parametrize("form", ["float", "packed"])
@pytest.mark.parametrize("order", [["cat", "dog", "eel"], ["eel", "cat", "dog"]], ids=str)
@pytest.mark.parametrize("there", [["cat", "dog", "eel"], ["dog", "eel"]], ids=str)
def test_images_are_scored_by_the_names_of_their_classes(there, order, form, tmp_path):
    """Fewer classes gave a float model a new, random head and a packed one an error about sizes; another order gave
    it the wrong classes."""
    model = sees_colours(order, tmp_path / "model", form)
    assert accuracy(model, folders(tmp_path / "images", there), tmp_path / "out") == 1.0


def test_classes_that_the_model_does_not_have(tmp_path):
    model = sees_colours(["cat", "dog", "eel"], tmp_path / "model", "float")
    images = folders(tmp_path / "images", ["cat", "dog", "fox"])
    with pytest.raises(SystemExit) as stopped:
        accuracy(model, images, tmp_path / "out")
    assert str(stopped.value).startswith(
        "error while loading the model: --model_name_or_path: the model does not know the class 'fox' of the images; "
        "it has 3: ['cat', 'dog', 'eel']..."
    )
    two = AutoModelForImageClassification.from_pretrained(model)
    two.config.id2label = {0: "cat", 1: "dog", 2: "dog"}
    two.save_pretrained(model)
    with pytest.raises(SystemExit, match="the model has two classes called 'dog' of the images"):
        accuracy(model, folders(tmp_path / "less", ["cat", "dog"]), tmp_path / "out")


@pytest.mark.parametrize("called", [("n01", "n02", "n03"), ("2", "10", "30")], ids=["synsets", "numbers"])
def test_names_that_say_the_same_in_other_words(called, tmp_path):
    """Folders of ImageNet have the names of synsets, or numbers: in the order of the model, if there are as many. As
    text 10 came before 2."""
    model = sees_colours(["cat", "dog", "eel"], tmp_path / "model", "float")
    images = folders(tmp_path / "images", ["cat", "dog", "eel"])
    for name, other in zip(("cat", "dog", "eel"), called, strict=True):
        (images / name).rename(images / other)
    assert accuracy(model, images, tmp_path / "out") == 1.0

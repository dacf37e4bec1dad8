"""`benchmark`: the sizes of pictures, scores that are NaN, numbers that are given twice; without processes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from quantized_models import quantized
from tiny_models import resnet, vit
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from transformers import (
    ConvNextImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTImageProcessor,
)

from hf_saq import pack
from hf_saq.timing import benchmark, measuring
from hf_saq.timing.inputs import images_for

AS_THEY_ARE = {"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture
def pictures(tmp_path):
    """Two of different sizes, of noise."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for k, size in enumerate([(20, 30), (24, 24)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


class Answers:
    """Stands for the process of a form that gives the same scores to every image."""

    scores = np.array([[0.0, 1.0, 2.0]], dtype=np.float32)

    def __init__(self, request: dict, stage):
        self.count = len(np.load(request["images"]))

    def ask(self, request: dict) -> dict:
        if "logits" in request:
            np.save(request["logits"], np.repeat(self.scores, self.count, axis=0))
        return {"wall": [1.0], "cpu": [1.0], "memory": None}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def answers(monkeypatch):
    monkeypatch.setattr(measuring, "Worker", Answers)
    return Answers


def saved(model, directory, processor=None):
    pack(quantized(lambda: model, activation_bits=8)).save_pretrained(directory)
    if processor is not None:
        processor.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("size", [12, (8, 16)])
def test_pictures_have_the_size_that_is_asked_for(size, pictures, answers, tmp_path):
    model = saved(resnet(), tmp_path / "model", ViTImageProcessor(**AS_THEY_ARE))
    height, width = (size, size) if isinstance(size, int) else size
    result = benchmark(model, forms=["packed"], rounds=1, images=pictures, image_size=size)
    assert result.images == f"2 pictures, 3 x {height} x {width}"
    found = images_for(resnet(), ViTImageProcessor(**AS_THEY_ARE), pictures, size)[0]
    for k, x in enumerate(found):
        pixels = pil_to_tensor(Image.open(pictures / f"{k}.png")).float() / 255 * 2 - 1
        torch.testing.assert_close(x, resize(pixels, [height, width], antialias=True), atol=1e-5, rtol=1e-5)


def test_another_size_than_that_of_the_processor_is_warned_of(pictures):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    with pytest.warns(UserWarning, match="image_size=32 is not what the image processor makes: 16 x 16 pixels"):
        assert images_for(resnet(), processor, pictures, 32)[0].shape == (2, 3, 32, 32)
    assert images_for(resnet(), processor, pictures, 16)[0].equal(images_for(resnet(), processor, pictures, None)[0])


def test_pictures_that_fit_nothing_are_named(pictures):
    with pytest.raises(
        ValueError, match=r"keeps the sizes of pictures: \(3, 20, 30\) and \(3, 24, 24\) in .*; pass im"
    ):
        images_for(resnet(), ViTImageProcessor(**AS_THEY_ARE), pictures, None)
    grey = vit()
    grey.config.num_channels = 1
    square = ConvNextImageProcessor(size={"shortest_edge": 16})
    with pytest.raises(ValueError, match=r"makes 3 channels of a picture, but the model takes 1; measure with noise"):
        images_for(grey, square, pictures, None)


@pytest.mark.parametrize("form_is_nan", [True, False])
def test_scores_that_are_nan_are_no_class(form_is_nan, answers, tmp_path, monkeypatch):
    """Sorting takes the first NaN for the largest score, of both models the same one."""
    model = vit()
    with torch.no_grad():
        model.classifier.bias[1] = math.nan
    if form_is_nan:
        monkeypatch.setattr(answers, "scores", np.array([[0.0, math.nan, 2.0]], dtype=np.float32))
    result = benchmark(saved(model, tmp_path / "model"), forms=["packed"], rounds=1)
    (form,) = result.forms
    assert form.same_top1 == 0 and math.isnan(form.difference) and "0 of 16" in str(result)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["forms"][0]["difference"] is None


def test_what_is_given_twice_is_measured_once(answers, tmp_path):
    model = saved(vit(), tmp_path / "model")
    result = benchmark(model, forms=["packed", "packed"], rounds=1, batch_sizes=(1, 2, 1), threads=(1, 1))
    assert [(t.form, t.threads, t.batch) for t in result.timings] == [("packed", 1, 1), ("packed", 1, 2)]
    assert len([line for line in str(result).splitlines() if line.startswith("packed ")]) == 2


def test_maps_are_compared_pixel_by_pixel(tmp_path, answers, monkeypatch):
    """The class of a column of each map was compared, as often as there are rows: 768 of 16 were the same."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1], "num_encoder_blocks": 2}
    lists = {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
    config = SegformerConfig(**sizes, **lists, decoder_hidden_size=8, num_labels=3, image_size=32)
    x = torch.randn(2, 3, 32, 32)
    model = pack(quantized(lambda: SegformerForSemanticSegmentation(config).eval(), x))
    model.save_pretrained(tmp_path)
    of_class_0 = np.eye(3, dtype=np.float32)[:1, :, None, None].repeat(8, axis=2).repeat(8, axis=3)
    monkeypatch.setattr(answers, "scores", of_class_0)
    result = benchmark(tmp_path, rounds=1, forms=["packed"], image_size=32)
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        classes = torch.cat([model(image).logits for image in noise.split(1)]).argmax(1)
    assert result.count == 16 * 8 * 8 and result.forms[0].same_top1 == (classes == 0).sum()

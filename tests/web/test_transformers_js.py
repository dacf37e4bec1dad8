"""An exported directory in transformers.js, under node: the same classes and probabilities as in Python."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from quantized_models import quantized
from tiny_models import IMAGE_SIZE, mobilenet_v2, resnet, vit
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline
from web_tools import needs_node, node

from hf_saq.export import ExportedClassifier, export_onnx
from hf_saq.export.checks.whole_model import own_logits

SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
# Two versions of one engine, whose softmax is computed in float32 and float64.
SAME = 1e-5
COUNT = 6


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _node() -> None:
    needs_node("@huggingface/transformers")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)) for _ in range(COUNT)]


def scores(labelled: list[dict]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in labelled}


@pytest.mark.parametrize(
    ("build", "bits"),
    [(vit, (8, 8)), (vit, (4, 4)), (resnet, (2, 4)), (mobilenet_v2, (4, 8))],
    ids=lambda value: getattr(value, "__name__", None) or "W{}A{}".format(*value),
)
def test_transformers_js_answers_as_python_does(build, bits, tmp_path):
    model = quantized(build, weight_bits=bits[0], activation_bits=bits[1])
    processor = ViTImageProcessor(size=SIZE, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7])
    export_onnx(model, tmp_path / "exported", processor=processor, engines=["onnxruntime"])
    shown = pictures()
    raw = b"".join(np.asarray(picture).tobytes() for picture in shown)
    ran = node("classify.mjs", tmp_path / "exported", "--raw", f"{IMAGE_SIZE}x{IMAGE_SIZE}", given=raw)
    assert ran.returncode == 0, ran.stderr
    in_js = [scores(json.loads(line)) for line in ran.stdout.splitlines()]

    read = AutoImageProcessor.from_pretrained(tmp_path / "exported")
    runtime = ExportedClassifier.from_pretrained(tmp_path / "exported", threads=1)
    in_runtime = [scores(f) for f in pipeline("image-classification", model=runtime, image_processor=read)(shown)]
    logits, own_noise, _ = own_logits(model, read(shown, return_tensors="pt")["pixel_values"])
    probabilities = torch.from_numpy(logits).double().softmax(-1).numpy()
    labels = [model.config.id2label[i] for i in range(len(probabilities[0]))]
    # What logits differ by where one rounding flips, at most: a change of d in logits moves a probability by d / 2.
    far = max(4 * own_noise, 2e-3) * np.sqrt(np.mean(logits**2))
    assert len(in_js) == COUNT
    for js, runtime_scores, expected in zip(in_js, in_runtime, probabilities, strict=True):
        assert js.keys() == set(labels) and abs(sum(js.values()) - 1) < SAME
        assert max(abs(js[label] - runtime_scores[label]) for label in labels) < SAME
        assert max(abs(js[label] - p) for label, p in zip(labels, expected, strict=True)) < far
        assert max(js, key=js.__getitem__) == labels[int(expected.argmax())]


def test_image_files_are_read(tmp_path):
    """A file of the model's own size: between sizes, transformers.js does not interpolate as Python does."""
    export_onnx(quantized(vit), tmp_path / "exported", processor=ViTImageProcessor(size=SIZE), check=False)
    (picture, *_) = pictures()
    picture.save(tmp_path / "picture.png")
    ran = node("classify.mjs", tmp_path / "exported", tmp_path / "picture.png")
    assert ran.returncode == 0, ran.stderr
    runtime = ExportedClassifier.from_pretrained(tmp_path / "exported", threads=1)
    read = AutoImageProcessor.from_pretrained(tmp_path / "exported")
    expected = scores(pipeline("image-classification", model=runtime, image_processor=read)(picture))
    found = scores(json.loads(ran.stdout))
    assert found.keys() == expected.keys()
    assert max(abs(found[label] - expected[label]) for label in expected) < SAME


def test_what_is_missing_is_named(tmp_path):
    export_onnx(quantized(vit), tmp_path / "exported", image_size=IMAGE_SIZE, check=False)
    ran = node("classify.mjs", tmp_path / "exported", "picture.png")
    assert ran.returncode == 1 and "has no preprocessor_config.json; export the model with its image" in ran.stderr
    shutil.rmtree(tmp_path / "exported" / "onnx")
    ran = node("classify.mjs", tmp_path / "exported", "picture.png")
    assert "preprocessor_config.json, onnx/model_quantized.onnx" in ran.stderr
    assert "expected a directory and images" in node("classify.mjs").stderr

"""`ExportedClassifier`: the same predictions on every engine, in a pipeline, and what it refuses to load."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python
from quantized_models import quantized
from test_checks import FILE
from tiny_models import conv_net, images, vit
from transformers import AutoImageProcessor, Trainer, TrainingArguments, ViTImageProcessor, pipeline

from hf_saq.export import ExportedClassifier, export_onnx
from hf_saq.export.checks.whole_model import own_logits
from hf_saq.outputs import logits_of

ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engines") / "vit"
    model = quantized(vit, activation_bits=8)
    export_onnx(model, directory, processor=ViTImageProcessor(size={"height": 16, "width": 16}))
    return model, directory


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_predicts_what_the_model_does(exported, engine: str):
    model, directory = exported
    x = images(7, seed=5)
    expected, own_noise, _ = own_logits(model, x)
    found = ExportedClassifier.from_pretrained(directory, engine=engine, threads=1)(pixel_values=x).logits
    assert far(found.numpy(), expected) <= max(4 * own_noise, 2e-3)
    assert torch.equal(found.argmax(-1), torch.from_numpy(expected).argmax(-1))


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_share_a_model_get_the_answers_to_their_own_images(exported, engine: str):
    model = ExportedClassifier.from_pretrained(exported[1], engine=engine, threads=1)
    batches = [images(2, seed=seed) for seed in range(4)]
    expected = [model(x).logits for x in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        found = list(pool.map(lambda i: model(batches[i % len(batches)]).logits, range(400)))
    assert all(torch.equal(logits, expected[i % len(batches)]) for i, logits in enumerate(found))


SIGNAL_STACK = """
import ctypes, gc, sys
from hf_saq.export import ExportedClassifier


class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


first, second = (ExportedClassifier.from_pretrained(sys.argv[1], engine="openvino", threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
found = Stack()
ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
with open("/proc/self/maps") as maps:
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
print(not found.start or any(low <= found.start < high for low, high in ranges))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_signals_have_memory_after_models_of_openvino_are_gone(exported):
    """Each core of OpenVINO took the stack of signal handlers along: a later signal, of a worker that loads data for
    example, was written over other memory (on CPUs with AVX512; on others nothing can be seen here)."""
    assert run_python("-c", SIGNAL_STACK, exported[1]).stdout.split()[-1] == "True"


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_for_other_processes_predict_the_same(exported, engine: str):
    """A session cannot be pickled, the graph can: for workers that are spawned."""
    own = ExportedClassifier.from_pretrained(exported[1], engine=engine, threads=1)
    for other in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert torch.equal(other(images()).logits, own(images()).logits)
        assert other.config.id2label == own.config.id2label and not other.training


def test_biases_of_convolutions_stay_in_float_where_rounding_them_counts(tmp_path):
    """With few bits, rounding a bias is a part of a step; the exact graph has no such difference. The export says
    which one it wants, and is loaded so."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
    )
    model = quantized(lambda: net, images(8, 32), weight_bits=4, activation_bits=4, first_last_bits=4)
    x = images(8, 32, seed=1)
    with pytest.warns(UserWarning, match="rounds biases of convolutions, .* loads it with exact=True"):
        report = export_onnx(model, tmp_path, example=x, engines=["onnxruntime"])
    assert report.exact and json.loads((tmp_path / "config.json").read_text())["hf_saq_export"]["exact"]
    assert (
        report.checks["integers"] == "0 of 3 layers run in integers in ONNX Runtime, biases of convolutions in float"
    )
    expected = model(x).detach().numpy()
    logits = {
        exact: ExportedClassifier.from_pretrained(tmp_path, exact=exact)(x).logits.numpy()
        for exact in (False, True, None)
    }
    assert far(logits[True], expected) < 1e-5 < 1e-3 < far(logits[False], expected)
    assert np.array_equal(logits[None], logits[True])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_module_has_no_configuration(engine: str, tmp_path):
    model, x = quantized(conv_net, images(4, 8)), images(4, 8)
    export_onnx(model, tmp_path, example=x)
    loaded = ExportedClassifier.from_pretrained(tmp_path, engine=engine, threads=1)
    expected, own_noise, _ = own_logits(model, x)
    assert loaded.config is None
    assert far(loaded(x).logits.numpy(), expected) <= max(4 * own_noise, 2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_works_in_a_pipeline(exported, engine: str, caplog):
    model, directory = exported
    processor = AutoImageProcessor.from_pretrained(directory)
    loaded = ExportedClassifier.from_pretrained(directory, engine=engine, threads=1)
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)) for seed in (0, 1)
    ]
    with caplog.at_level(logging.WARNING):
        classify = pipeline("image-classification", model=loaded, image_processor=processor)
        found = classify(pictures)
    assert not caplog.records
    with torch.no_grad():
        expected = logits_of(model(**processor(pictures, return_tensors="pt"))).softmax(-1)
    for answers, probabilities in zip(found, expected, strict=True):
        scores = torch.tensor([next(a["score"] for a in answers if a["label"] == f"LABEL_{i}") for i in range(3)])
        torch.testing.assert_close(scores, probabilities, atol=0.02, rtol=0)  # a flip of 8 bits or two


def test_labels_give_the_loss_of_a_classifier(exported, tmp_path):
    """`Trainer.evaluate` stopped: labels were dropped without a word, and so was every argument it did not know."""
    loaded, x = ExportedClassifier.from_pretrained(exported[1], threads=1), images(6, seed=5)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    logits = loaded(x).logits
    expected = -logits.log_softmax(-1)[range(6), labels].mean()
    assert loaded(x).loss is None
    torch.testing.assert_close(loaded(pixel_values=x, labels=labels).loss, expected)
    loss, scores = loaded(x, labels, return_dict=False)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(scores, logits) and torch.equal(loaded(x, return_dict=False)[0], logits)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixel_value'"):
        loaded(x, pixel_value=x)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(x, labels, strict=True)]
    how = TrainingArguments(tmp_path, per_device_eval_batch_size=6, report_to=[], use_cpu=True)
    metrics = Trainer(loaded, how, eval_dataset=rows).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_labels_without_a_configuration_are_refused(tmp_path):
    model, x = quantized(conv_net, images(4, 8)), images(4, 8)
    export_onnx(model, tmp_path, example=x)
    loaded = ExportedClassifier.from_pretrained(tmp_path, threads=1)
    assert len(loaded(x, return_dict=False)) == 1
    with pytest.raises(ValueError, match="labels without a configuration"):
        loaded(x, labels=torch.zeros(4, dtype=torch.long))


def test_what_is_no_export_is_refused(exported, tmp_path):
    model, directory = exported
    load = ExportedClassifier.from_pretrained
    with pytest.raises(ValueError, match=r"engine='tensorrt'; expected one of \['onnxruntime', 'openvino'\]"):
        load(directory, engine="tensorrt")
    with pytest.raises(ValueError, match="has no config.json; expected a directory that `export_onnx` wrote"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged .*export the model again"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'hf_saq_export'; .*AutoModelForImageClassification.from_pretrained"):
        load(tmp_path)
    fields = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{FILE} is missing; export the model again"):
        load(tmp_path)
    (tmp_path / "onnx").mkdir()
    content = bytearray((directory / FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that was exported .*SHA-256 differs"):
        load(tmp_path)
    fields["hf_saq_export"]["format_version"] = 9
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="format_version is 9, but this hf_saq reads 1; install a newer hf_saq"):
        load(tmp_path)

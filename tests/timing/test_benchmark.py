"""`benchmark`: forms in processes of their own, what is compared, skipped and refused. No test looks at times."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import quantized
from tiny_models import resnet, vit
from torch import nn
from transformers import ViTImageProcessor

from hf_saq import dequantize, pack
from hf_saq.cli import main
from hf_saq.export import export_onnx
from hf_saq.export.layout import RECORD
from hf_saq.timing import FORMS, benchmark, measuring
from hf_saq.timing.forms import WRITERS, StoredForms
from hf_saq.timing.loading import LOADERS
from hf_saq.timing.machine import cores
from hf_saq.timing.processes import Worker, WorkerError
from hf_saq.timing.results import Timing
from hf_saq.timing.worker import answer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("timing") / "packed"
    pack(quantized(vit, activation_bits=8)).save_pretrained(directory)
    return directory


@pytest.mark.slow  # a process for each form
def test_forms_are_measured_side_by_side(saved):
    """In processes of their own: one form of torch and one of an engine."""
    said: list[str] = []
    names = ["packed-decoded-once", "onnx-int8"]
    result = benchmark(saved, forms=names, rounds=2, batch_sizes=(1, 3), tell=said.append)
    assert [form.name for form in result.forms] == names and not result.skipped
    assert [(t.form, t.batch) for t in result.timings] == [(name, batch) for batch in (1, 3) for name in names]
    packed, exported = result.forms
    assert packed.same_top1 == result.count == 16 and packed.difference < 1e-5
    assert packed.file_bytes == (saved / "model.safetensors").stat().st_size
    assert exported.difference < 0.1  # the first layer alone decides how often roundings flip
    assert all(t.fastest <= t.lower_quartile <= t.median <= t.upper_quartile and t.calls >= 2 for t in result.timings)
    assert all(t.ratio == 1 for t in result.timings if t.form == result.reference == "packed-decoded-once")
    assert any("round 2 of 2" in line for line in said) and any("onnx-int8" in line for line in said)
    assert json.loads(json.dumps(result.to_dict()))["timings"][0]["form"] == "packed-decoded-once"
    assert "onnx-int8" in str(result) and f"{cores()} cores" in str(result)


@pytest.mark.slow
def test_every_form_is_measured(saved):
    result = benchmark(saved, rounds=1)
    assert [form.name for form in result.forms] == list(FORMS) and not result.skipped
    by_name = {form.name: form for form in result.forms}
    assert all(by_name[name].difference < 1e-5 for name in ("packed", "packed-decoded-once", "fake-quantized"))
    assert all(by_name[name].difference > 1e-5 for name in ("float", "onnx-float"))  # inputs are not quantized
    assert by_name["float"].difference == pytest.approx(by_name["openvino-float"].difference, rel=1e-3)
    assert result.reference == "onnx-float"


@pytest.mark.slow
def test_a_model_in_bfloat16_is_measured_in_it(tmp_path):
    model = nn.Module.bfloat16(pack(quantized(resnet, activation_bits=8)))
    model.save_pretrained(tmp_path)
    (form,) = benchmark(tmp_path, forms=["float"], rounds=1, image_size=16).forms
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        y, y_float = (each(x).logits.float() for each in (model, dequantize(model).eval()))
    assert form.same_top1 == (y.argmax(1) == y_float.argmax(1)).sum()
    assert form.difference == pytest.approx(((y - y_float).norm() / y.norm()).item(), rel=0.05) and form.difference > 0


def test_what_cannot_be_measured_is_skipped_with_the_reason(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        ValueError, match=r"no form of .* can be measured\. openvino-float: openvino is needed .*openvino"
    ):
        benchmark(saved, forms=["openvino-float"], rounds=1)


def test_a_form_that_ends_says_why(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((1, 3, 4, 4), dtype=np.float32))
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    request = {"name": "x", "loader": "onnxruntime", "threads": 1, "images": str(tmp_path / "images.npy")}
    with pytest.raises(WorkerError, match="InvalidProtobuf"):
        Worker({**request, "path": str(tmp_path / "damaged.onnx")}, tmp_path)


class Scripted:
    """Answers as a worker whose calls take `seconds` each, and ends at batches of `ends_at`."""

    def __init__(self, seconds: float, ends_at: int = 0):
        self.seconds, self.ends_at = seconds, ends_at

    def ask(self, request: dict) -> dict:
        if request["batch"] == self.ends_at:
            raise WorkerError("it ran out of memory")
        return {"wall": [self.seconds], "cpu": [self.seconds], "memory": None}


def test_ratios_are_to_a_form_that_was_measured_throughout():
    """Where the reference fails at the second batch size, ratios of the first are to another one too."""
    workers: dict = {"onnx-float": Scripted(1.0, ends_at=8), "float": Scripted(2.0), "packed": Scripted(6.0)}
    skipped: dict[str, str] = {}
    cells = [measuring._in_turns(workers, 1, batch, 3, skipped, lambda _: None) for batch in (1, 8)]
    assert skipped == {"onnx-float": "batch 8: it ran out of memory"}
    for cell in cells:
        found = {timing.form: timing for timing in measuring._timings(cell, ["float", "packed"], "float", "wall")}
        assert {name: timing.ratio for name, timing in found.items()} == {"float": 1.0, "packed": 3.0}
        assert found["packed"].batch == cell.batch and found["packed"].calls == 3


def test_a_turn_repeats_one_batch_for_as_long_as_it_is_told():
    shapes = []

    def run(x: np.ndarray) -> np.ndarray:
        shapes.append(x.shape)
        return x

    found = answer({"batch": 5, "seconds": 0.0}, run, np.zeros((2, 3, 4, 4), dtype=np.float32), 0)
    assert shapes == [(5, 3, 4, 4)] and len(found["wall"]) == len(found["cpu"]) == 1


def test_more_threads_than_told_are_noticed():
    times = {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0, "fastest": 1.0, "ratio": 1.0, "wall": 1.0}
    timing = Timing(form="float", threads=2, batch=1, cpu=2.1, memory_bytes=None, calls=1, **times)
    assert not timing.is_busier_than_told
    assert Timing(form="float", threads=1, batch=1, cpu=2.1, memory_bytes=None, calls=1, **times).is_busier_than_told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": (0,)}, r"batch_sizes=\(0,\); expected positive integers"),
        ({"threads": ()}, r"threads=\(\); expected positive integers"),
        ({"threads": (10**6,)}, r"threads=1000000; this process may use \d+ cores"),
        ({"rounds": 0}, r"rounds=\[0\]; expected positive integers"),
        ({"forms": ["int8"]}, r"forms=\['int8'\]; expected some of \['float', "),
        ({"clock": "sun"}, r"clock='sun'; expected one of \['wall', 'process'\]"),
        ({"target": "tpu", "forms": ["onnx-int8"]}, r"target='tpu'; expected one of"),
        ({"images": "nowhere"}, r"images='nowhere' is no folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark(saved, **arguments)


def test_pictures_need_a_processor_and_are_prepared_by_it(saved, tmp_path):
    from PIL import Image

    from hf_saq.timing.inputs import images_for

    with pytest.raises(ValueError, match="has no pictures; expected files that end in"):
        images_for(vit(), ViTImageProcessor(), tmp_path, None)
    for i in range(2):
        Image.new("RGB", (20, 30), (i * 200, 0, 0)).save(tmp_path / f"{i}.png")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    found, told = images_for(vit(), processor, tmp_path, None)
    assert found.shape == (2, 3, 16, 16) and told == "2 pictures" and not torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="no image processor beside it"):
        images_for(vit(), None, tmp_path, None)


def test_an_export_is_no_saved_model(tmp_path, capsys):
    export_onnx(quantized(vit, activation_bits=8), tmp_path, check=False)
    assert main(["benchmark", str(tmp_path)]) == 1
    assert "is an export, a graph without the weights of a model; expected the saved model" in capsys.readouterr().err


def test_a_model_with_its_export_beside_it_is_a_saved_model(saved, tmp_path):
    """`SAQTrainer.export_onnx` leaves both in one directory, and names the graph in the model's configuration."""
    both = tmp_path / "both"
    shutil.copytree(saved, both)
    export_onnx(quantized(vit, activation_bits=8), tmp_path / "alone", check=False)
    record = json.loads((tmp_path / "alone" / "config.json").read_text())[RECORD]
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({**config, RECORD: record}))
    assert StoredForms(str(both), tmp_path / "stage", "cpu").model is not None


def test_every_form_says_what_it_is():
    assert all(form.about and form.file in WRITERS and form.loader in LOADERS for form in FORMS.values())

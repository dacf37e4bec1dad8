"""The comparison of engines: what it stores, what its page says of it, and that CPUID answers as it is made to."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_models import vit

from benchmarks.accuracy.engines import elsewhere, measure, models
from benchmarks.accuracy.engines.page import ENGINES, page
from benchmarks.accuracy.task import Data
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import float_state, images_of
from benchmarks.shared.images import Images


def record(name: str, outcome: dict, **arguments) -> dict:
    about = {"task": "flowers", "quantization": {"weight_bits": 8, "activation_bits": 8}, "steps": 5, "images": 200}
    return {"name": name, "arguments": {**about, **arguments}, "outcome": outcome, "versions": {"python": "3"}}


def run(name: str, target: str, engine: str, place: str, top1: float) -> dict:
    first = {"top1": 0.81, "hf_saq": 0.8}
    outcome = {"top1": top1, "hf_saq": 0.8, "margin": 0.012, "same": 0.97, "difference": 0.01, "first": first}
    return record(f"{name}-{target}-{engine}-{place}", outcome, engine=engine, place=place, target=target)


@pytest.fixture
def stored(tmp_path):
    export = {
        "bytes": 5_900_000,
        "int4_bytes": 3_304_000,
        "layers": 9,
        "split": ["a", "b"],
        "checks": {"integers": "8 of 9 layers run in"},
        "refused": "",
    }
    records = [
        record("m-hf_saq", {"top1": 0.8, "float": 0.81}),
        record("m-float64", {"top1": 0.795, "hf_saq": 0.8, "margin": 0.002, "first": {"top1": 0.8, "hf_saq": 0.8}}),
        record("m-cpu-export", {**export, "exact": True}),
        record("m-cpu-vnni-export", {**export, "split": [], "checks": {}, "refused": "export not written, because."}),
        *(
            run("m", "cpu", engine, place, 0.805)
            for engine in ("onnxruntime", "openvino")
            for place in elsewhere.PLACES
        ),
        *(
            run("m", "cpu", "onnxruntime-exact-bias", place, top1)
            for place, top1 in zip(elsewhere.PLACES, (0.79, 0.804), strict=True)
        ),
        run("m", "cpu-vnni", "openvino", "no-vnni", 0.4),
    ]
    for engine in ENGINES:
        found = {"expected": 2072640.0, "found": 1048544.0, "saturates": True}
        records.append(record(f"saturation-{engine}-no-vnni", found, engine=engine, place="no-vnni"))
    for entry in records:
        (tmp_path / f"{entry['name']}.json").write_text(json.dumps(entry))
    return tmp_path


def test_the_page_says_what_is_stored(stored):
    text = page(stored)
    near = "80.5 (+0.50 ± 1.20)"
    assert (
        f"| MobileNetV2, W8A8 | 81.0 | 80.0 | 79.5 (-0.50 ± 0.20) | {near} | {near} | {near} | {near} "
        "| 79.0 (-1.00 ± 1.20) | 80.4 (+0.40 ± 1.20) |" in text
    )
    assert "all 4 runs are within 0.5 points of hf_saq. No difference is larger than its interval." in text
    assert (
        "On the first 300 images alone, 0 of 4 runs are within 0.5 points of hf_saq; not MobileNetV2, W8A8 in " in text
    )
    far = (
        "3 of 4 runs are within 0.5 points of hf_saq; not MobileNetV2, W8A8 in ONNX Runtime, exact, VNNI. On the first"
    )
    assert f"As `ExportedClassifier` loads them, {far}" in text and f"by `exact=True`, {far}" in text
    assert (
        "in float64 instead of float32, on all images: all 1 runs are within 0.5 points of hf_saq. On the first 300 "
        "images alone, all 1 runs" in text
    )
    assert "- MobileNetV2, W8A8: ONNX Runtime 97.0, OpenVINO 97.0, ONNX Runtime, exact 97.0" in text
    assert (
        "| MobileNetV2, W8A8 | 81.0 | 80.0 | 79.5 (-0.50 ± 0.20) | not run | not run | not run "
        "| 40.0 (-40.00 ± 1.20) | not run | not run |" in text
    )
    assert "- OpenVINO, no VNNI: a sum of the largest products saturates, 1,048,544 of 2,072,640" in text
    assert "| `cpu` | 5.90 MB | 3.30 MB | 2 | 8 of 9 | passed | needed |" in text
    assert "| `cpu-vnni` | 5.90 MB | 3.30 MB | 0 | not counted | export not written, because. | - |" in text


def test_an_engine_that_is_further_off_is_named(stored):
    entry = run("m", "cpu", "openvino", "here", 0.785)
    (stored / f"{entry['name']}.json").write_text(json.dumps(entry))
    text = page(stored)
    assert "3 of 4 runs are within 0.5 points of hf_saq; not MobileNetV2, W8A8 in OpenVINO, VNNI." in text
    assert "Differences larger than their interval: MobileNetV2, W8A8 in OpenVINO, VNNI." in text


def test_the_margin_is_that_of_paired_differences():
    own, labels = np.eye(4)[[0, 1, 2, 3]], np.array([0, 1, 2, 0])
    found = measure.compared(np.eye(4)[[0, 1, 3, 0]], own, labels)  # one better, one worse
    assert found["top1"] == found["hf_saq"] == 0.75 and found["same"] == 0.5
    assert found["margin"] == pytest.approx(1.96 * np.std([0, 0, -1, 1]) / 2, rel=1e-4)


def test_a_page_needs_results(tmp_path):
    with pytest.raises(ValueError, match="no run of hf_saq itself; run `make engine-accuracy`"):
        page(tmp_path)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_features_that_are_hidden_are_not_found(tmp_path):
    """Products of the largest codes saturate where engines find AVX2 and no VNNI, and only there."""
    from benchmarks.accuracy.engines.probe import saturates

    try:
        without = saturates("onnxruntime", elsewhere.WITHOUT_VNNI, tmp_path)
    except ValueError as error:
        if "compiled" in str(error) or "cannot be made to fault" in str(error):
            pytest.skip(str(error))
        raise
    assert without["found"] < without["expected"] == 64 * 255 * 127 and without["saturates"]


def tiny_data(_paths) -> Data:
    pixels = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    images = Images(pixels, torch.randint(0, 3, (60,)))
    return Data(images, images, images, lambda x, _: x.float() / 127.5 - 1, lambda x: x.float() / 127.5 - 1)


@pytest.mark.slow
def test_a_small_run_and_what_a_restart_skips(tmp_path, monkeypatch):
    changes = dict(load=tiny_data, build=vit, train_float=lambda *_: vit(), batch_size=8, precision="float32")
    monkeypatch.setitem(TASKS, "flowers-vit", dataclasses.replace(TASKS["flowers-vit"], **changes))
    monkeypatch.setattr(models, "BITS", ((8, 8), (4, 4)))
    monkeypatch.setattr(measure, "PLACES", ("here",))
    images_of.cache_clear(), float_state.cache_clear()
    arguments = ["--tasks", "flowers-vit", "--steps", "2", "--images", "40", "--results", str(tmp_path / "results")]
    arguments += ["--document", str(tmp_path / "page.md"), "--cache", str(tmp_path / "cache")]
    with pytest.warns(UserWarning, match="which CPUs without VNNI get wrong"):
        measure.main(arguments)
    stored = {path.stem: json.loads(path.read_text())["outcome"] for path in (tmp_path / "results").iterdir()}
    expected = {f"flowers-vit-{bits}-cpu-{engine}-here" for bits in ("w8a8", "w4a4") for engine in ENGINES}
    assert expected < set(stored) and "flowers-vit-w8a8-cpu-vnni-export" in stored
    assert "flowers-vit-w4a4-cpu-vnni-export" not in stored  # 4-bit weights are no control
    for name in expected | {"flowers-vit-w4a4-float64"}:
        assert stored[name]["same"] >= 0.9 and stored[name]["difference"] < 0.3
        assert abs(stored[name]["top1"] - stored[name]["hf_saq"]) <= 0.1
    monkeypatch.setattr(measure, "model_of", None)  # a restart must not need it
    measure.main(arguments)
    assert "ViT-tiny, W4A4" in (tmp_path / "page.md").read_text()
    images_of.cache_clear(), float_state.cache_clear()

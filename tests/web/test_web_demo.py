"""The demo in headless Chromium: what it sees of drawings and images, and that it answers as Python does."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from tiny_models import seeded
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor
from web_tools import WEB, needs_node, node

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.export.checks.whole_model import own_logits

pytestmark = pytest.mark.slow

BITS = {"saq-w4a4": 4, "saq-w2a2": 2}
SEVEN = [[[0.3, 0.2], [0.7, 0.2], [0.45, 0.8]]]
LINE = [[[0.5, 0.1], [0.5, 0.9]]]


@pytest.fixture(scope="module")
def build():
    needs_node("onnxruntime-web", "puppeteer-core")
    if node("drive.mjs", "http://127.0.0.1").stderr.startswith("drive: error: no Chromium"):
        pytest.skip("there is no Chromium: `apt-get install chromium`, or name one with $CHROMIUM")
    sys.path.insert(0, str(WEB))
    yield importlib.import_module("build")
    sys.path.remove(str(WEB))


@pytest.fixture(scope="module")
def models(build, tmp_path_factory) -> Path:
    """What the example leaves of a run, of models that have seen each digit a few times."""
    from image_model import small_vit

    directory = tmp_path_factory.mktemp("models")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    y = torch.tensor(digits.target)
    with seeded(0):
        model = small_vit([str(i) for i in range(10)], 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for batch in (b for _ in range(4) for b in torch.randperm(1200).split(48)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]).logits, y[batch]).backward()
            optimizer.step()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    rows = [{"method": "float", "bits": "W32A32", "bytes": 1000, "top1": 0.5}]
    model.eval().save_pretrained(directory / "float")
    for name, bits in BITS.items():
        config = SAQQuantizationConfig(weight_bits=bits, activation_bits=bits)
        loaded = AutoModelForImageClassification.from_pretrained(directory / "float")
        pack(calibrate(quantize(loaded, config), [x[:256]])).save_pretrained(directory / name)
        rows.append({"method": "saq", "bits": f"W{bits}A{bits}", "bytes": 100 * bits, "top1": 0.25})
    for name in ("float", *BITS):
        processor.save_pretrained(directory / name)
    (directory / "results.json").write_text(json.dumps(rows))
    return directory


@pytest.fixture(scope="module")
def page(build, models, tmp_path_factory) -> Path:
    return build.main(["--models", str(models), "--output_dir", str(tmp_path_factory.mktemp("page") / "page")])


@contextmanager
def served(directory: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def visited(page: Path, steps: list[dict], screenshots: Path | None = None) -> dict:
    with served(page) as url:
        arguments = [] if screenshots is None else ["--screenshots", screenshots]
        ran = node("drive.mjs", url, *arguments, given=json.dumps(steps).encode(), timeout=300)
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)
        assert {request.startswith((url, "data:", "blob:")) for request in found["requests"]} == {True}
    return found


@pytest.fixture(scope="module")
def visit(page, tmp_path_factory) -> dict:
    """One visit, whose steps the tests look at."""
    files = tmp_path_factory.mktemp("files")
    for name, ink, paper in (("dark", "black", "white"), ("light", "white", "#202040")):
        image = Image.new("RGB", (90, 120), paper)
        ImageDraw.Draw(image).line([(30, 20), (70, 20), (45, 100)], fill=ink, width=12, joint="curve")
        image.save(files / f"{name}.png")
    (files / "notes.txt").write_text("no image")
    Image.new("RGB", (20, 20), "white").save(files / "blank.png")
    steps = {
        "seven": {"draw": SEVEN},
        "cleared": {"click": "#clear"},
        "line": {"draw": LINE},
        "undone": {"click": "#undo"},
        "keys": {"keys": ["Space", *["ArrowDown"] * 6, "Space"]},
        "escaped": {"keys": ["Escape"]},
        "dark": {"open": str(files / "dark.png")},
        "light": {"drop": str(files / "light.png")},
        "sample": {"click": "#samples button:nth-child(4)"},
        "no image": {"open": str(files / "notes.txt")},
        "blank": {"drop": str(files / "blank.png")},
        "again": {"click": "#samples button:nth-child(4)"},
    }
    found = visited(page, list(steps.values()), files)
    pictures = [f"{size}-{scheme}.png" for size in ("desktop", "narrow") for scheme in ("light", "dark")]
    assert all((files / picture).is_file() for picture in pictures)
    return {**found, "steps": dict(zip(["loaded", *steps], found["steps"], strict=True))}


def test_nothing_goes_wrong_in_the_browser(visit):
    assert visit["complaints"] == []
    assert visit["narrow"]["width"] <= visit["narrow"]["viewport"]  # nothing sticks out to the side
    assert visit["steps"]["loaded"]["status"] == "Draw a digit."


@pytest.mark.parametrize("step", ["seven", "line", "keys", "dark", "sample"])
def test_it_answers_as_python_does_on_the_same_pixels(visit, models, step):
    found = visit["steps"][step]
    grey = np.array(found["pixels"], dtype=np.uint8).reshape(8, 8)
    assert [answer["bits"] for answer in found["answers"]] == ["W32A32", "W4A4", "W2A2"]
    for answer, name in zip(found["answers"], ("float", *BITS), strict=True):
        model = AutoModelForImageClassification.from_pretrained(models / name).eval()
        x = AutoImageProcessor.from_pretrained(models / name)(
            Image.fromarray(grey).convert("RGB"), return_tensors="pt"
        )["pixel_values"]
        if name == "float":
            with torch.no_grad():
                logits, far = model(x).logits.numpy(), 1e-4
        else:  # as far as the model is from itself where a rounding flips; d in logits is at most d / 2 here
            logits, own_noise, _ = own_logits(model, x)
            far = max(4 * own_noise, 2e-3) * float(np.sqrt(np.mean(logits**2)))
        expected = torch.from_numpy(logits).double().softmax(-1).numpy()[0]
        assert np.abs(np.array(answer["probabilities"]) - expected).max() < far
        first, second = np.sort(expected)[::-1][:2]
        assert answer["digit"] == str(expected.argmax()) or first - second < 2 * far


def test_cards_show_sizes_and_times(visit, page):
    described = json.loads((page / "models.json").read_text())["models"]
    for answer, facts in zip(visit["steps"]["seven"]["answers"], described, strict=True):
        graph = page / facts["directory"] / facts["graph"]
        assert answer["facts"]["ONNX file"] == f"{round(graph.stat().st_size / 1024):,} KiB"
        assert answer["facts"]["Weights, stored"] == f"{round(facts['packed_bytes'] / 1024):,} KiB"
        assert float(answer["facts"]["One image"].removesuffix(" ms")) > 0
    assert described[0]["graph_bytes"] > 2 * described[1]["graph_bytes"]


def test_a_line_is_seen_as_dots_are_counted(visit):
    """A pen of 4.6 dots in the middle of 32 inks the dots 14 to 17: two of four in each of the columns 3 and 4."""
    seen = np.array(visit["steps"]["line"]["pixels"]).reshape(8, 8)
    half = round(255 * 8 / 16)
    assert (seen[1:-1, 3:5] == half).all() and seen[[0, -1], 3:5].min() > 0  # its ends are round
    assert not seen[:, :3].any() and not seen[:, 5:].any()
    assert np.array_equal(np.array(visit["steps"]["keys"]["pixels"]).reshape(8, 8), seen)  # drawn with the keyboard


def test_an_image_is_seen_dark_on_light_and_light_on_dark(visit):
    dark, light = (np.array(visit["steps"][name]["pixels"]).reshape(8, 8) for name in ("dark", "light"))
    assert np.array_equal(dark, light)
    assert dark[0].astype(bool).sum() >= 4 and 1 <= dark[-1].astype(bool).sum() <= 3  # a seven: a bar, and a foot
    assert dark[-1, :4].any() and not dark[4:, 6:].any()


def test_scans_are_those_of_the_held_out_split(visit, page):
    samples = json.loads((page / "models.json").read_text())["samples"]
    assert [sample["label"] for sample in samples] == list(range(10))
    assert visit["steps"]["sample"]["pixels"] == samples[3]["pixels"]
    scans = (load_digits().images / 16 * 255).round().astype(int).reshape(-1, 64).tolist()
    assert all(sample["pixels"] in scans for sample in samples)


@pytest.mark.parametrize("step", ["cleared", "undone", "escaped"])
def test_what_is_taken_back_is_gone(visit, step):
    found = visit["steps"][step]
    assert found["pixels"] is None and found["error"] is None
    assert {answer["digit"] for answer in found["answers"]} == {"–"}


def test_what_is_no_image_of_a_digit_is_named(visit):
    steps = visit["steps"]
    assert "notes.txt cannot be read as an image" in steps["no image"]["error"]
    assert "Choose a PNG" in steps["no image"]["error"]
    assert steps["blank"]["error"].startswith("blank.png: This image is of one shade; expected one digit")
    assert steps["again"]["error"] is None and steps["again"]["pixels"] == steps["sample"]["pixels"]


def test_a_page_with_a_missing_model_says_so(page, tmp_path):
    shutil.copytree(page, tmp_path / "page")
    shutil.rmtree(tmp_path / "page" / "models" / "saq-w4a4" / "onnx")
    (loaded,) = visited(tmp_path / "page", [])["steps"]
    assert "models/saq-w4a4/onnx/model_quantized.onnx could not be fetched (HTTP 404)" in loaded["error"]
    assert loaded["status"] == "The page is not complete."


def test_models_that_are_not_there_are_named(build, models, tmp_path, capsys):
    shutil.copytree(models, tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "saq-w2a2")
    with pytest.raises(SystemExit):
        build.main(["--models", str(tmp_path / "models"), "--output_dir", str(tmp_path / "page")])
    assert "has no saq-w2a2; expected the output of the example with 4 and 2 bits" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()

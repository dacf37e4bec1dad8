"""`hf-saq eval`, `compare` and `analyze`: what they measure on images from disk, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from hf_saq.analysis import sharpness
from hf_saq.cli import main
from hf_saq.cli.saved_images import numbers_of_classes
from hf_saq.export import export_onnx
from hf_saq.storage.saved_directory import load_any_saved, load_saved

SIZE = 16


def batch_of(images: Path) -> dict[str, torch.Tensor]:
    """The split `val`, read and normalized by hand, with the numbers that the model gives to its classes."""
    files = sorted((images / "val").glob("*/*.png"))
    pixels = torch.stack([pil_to_tensor(Image.open(file)) for file in files]).float() / 255
    numbers = {"cat": 0, "ant": 1, "bee": 2}
    return {"pixel_values": pixels * 2 - 1, "labels": torch.tensor([numbers[file.parent.name] for file in files])}


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()[-1] if err else ""


def on(images: Path) -> tuple:
    return ("--data", images, "--augmentation", "none", "--batch-size", 5, "--device", "cpu")


@pytest.mark.parametrize("form", ["float", "packed"])
def test_eval_is_the_accuracy_of_the_model(form, saved, images, capsys):
    model, batch = load_any_saved(str(saved / form))[0], batch_of(images)
    with torch.no_grad():
        outputs = model(**batch)
    status, out, _ = run(capsys, "eval", saved / form, *on(images), "--json")
    found = json.loads(out)
    assert status == 0 and found["images"] == 12 and found["top5"] == 1
    assert found["top1"] == pytest.approx((outputs.logits.argmax(1) == batch["labels"]).double().mean().item())
    assert found["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
    assert "12 images of" in run(capsys, "eval", saved / form, *on(images))[1]


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("graph") / "exported"
    model, processor = load_saved(str(saved / "packed"))
    export_onnx(model, directory, processor=processor)
    return directory


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_eval_of_an_exported_graph_is_the_accuracy_of_its_model(engine, saved, exported, images, capsys):
    model, batch = load_any_saved(str(saved / "packed"))[0], batch_of(images)
    with torch.no_grad():
        outputs = model(**batch)
    status, out, err = run(capsys, "eval", exported, *on(images), "--engine", engine, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["top1"] == pytest.approx((outputs.logits.argmax(1) == batch["labels"]).double().mean().item())
    assert found["loss"] == pytest.approx(outputs.loss.item(), rel=1e-2)  # integers: as far as the checks allow


def test_an_export_runs_where_a_model_is_expected_only_in_eval(saved, exported, images, capsys, tmp_path):
    assert run(capsys, "eval", exported, *on(images))[0] == 0  # its engine needs no naming
    for command in (
        ("inspect", exported),
        ("pack", exported, tmp_path / "packed"),
        ("dequantize", exported, tmp_path / "float"),
        ("compare", saved / "packed", exported, *on(images)),
        ("analyze", exported, *on(images)),
        ("card", exported),
    ):
        status, _, err = run(capsys, *command)
        assert status == 1 and f"{exported} is an export, a graph without the weights" in err, command


def test_mistakes_about_graphs(saved, exported, images, capsys, tmp_path):
    status, _, err = run(capsys, "eval", saved / "packed", *on(images), "--engine", "onnxruntime")
    assert status == 1 and "config.json has no 'hf_saq_export'" in err
    status, _, err = run(capsys, "eval", exported, "--data", images, "--device", "cuda")
    assert status == 1 and "--device cuda: exported graphs run on the CPU" in err
    for name, said in (("preprocessor_config.json", "has no image processor"), ("config.json", "expected `id2label`")):
        copy = tmp_path / name
        shutil.copytree(exported, copy)
        fields = json.loads((copy / "config.json").read_text())
        if name == "config.json":
            (copy / name).write_text(json.dumps({"hf_saq_export": fields["hf_saq_export"]}))
        else:
            (copy / name).unlink()
        status, _, err = run(capsys, "eval", copy, *on(images))
        assert status == 1 and said in err, err


def test_compare(saved, images, capsys, tmp_path):
    status, out, _ = run(capsys, "compare", saved / "latent", saved / "packed", *on(images), "--json")
    assert status == 0 and json.loads(out)["agreement"] == 1
    picture = tmp_path / "layers.svg"
    out = run(capsys, "compare", saved / "float", saved / "packed", *on(images), "--plot", picture)[1]
    assert "of 12 predictions agree" in out and picture.stat().st_size > 1000


def test_analyze_writes_one_page(saved, images, capsys, tmp_path):
    page = tmp_path / "page.html"
    argv = ("analyze", saved / "packed", *on(images), "--output", page, "--json", "--parts")
    status, out, _ = run(capsys, *argv, "sharpness", "--rho", 0.1)
    assert status == 0 and page.read_text().count("<img") == 1
    model, batch = load_saved(str(saved / "latent"))[0], batch_of(images)
    alone = sharpness(model, [{k: v[i : i + 5] for k, v in batch.items()} for i in (0, 5, 10)], 0.1, progress=False)
    assert json.loads(out)["Sharpness of packed"]["steepest"]["mean"] == pytest.approx(alone.steepest.mean, rel=1e-3)
    picture = ("--landscape", saved / "latent" / "landscape.png")
    found = json.loads(run(capsys, *argv, "landscape", "--points", 3, "--beside", saved / "latent", *picture)[1])
    assert [s["name"] for s in found["Landscape over a plane"]["surfaces"]] == ["packed", "latent"]
    assert picture[1].stat().st_size > 1000
    assert page.read_text().count("<img") == 2 and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_sensitivities_keep_to_their_passes(saved, images, capsys, tmp_path):
    argv = ("analyze", saved / "packed", *on(images), "--parts", "sensitivity", "--passes", 60)
    argv += ("--output", tmp_path / "page.html", "--json")
    of_packed = json.loads(run(capsys, *argv)[1])["Sensitivity of the layers of packed"]
    of_float = json.loads(run(capsys, *argv, "--float", saved / "float")[1])["Sensitivity of the layers of float"]
    for found in (of_packed, of_float):
        assert found["passes"] <= 60 and {entry["bits"] for entry in found["entries"]} == {2, 3, 4, 6, 8}
    gained = [
        {e["name"]: e["loss_rise"] for e in found["entries"] if e["operand"] == "weight" and e["bits"] == 8}
        for found in (of_packed, of_float)
    ]
    assert max(map(abs, gained[0].values())) < 1e-6 < max(map(abs, gained[1].values()))  # no values between codes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("eval", "{saved}/packed", "--data", "{saved}/nowhere/"), "--data '{saved}/nowhere/': there is no such dir"),
        (("eval", "{saved}/packed", "--data", "{images}", "--split", "dev"), "--split 'dev'; the dataset has the spl"),
        (("eval", "{saved}/packed", "--data", "digits"), "--data digits: 10 of its 10 classes are none of the model"),
        (("eval", "{saved}/packed", "--data", "digits", "--batch-size", "0"), "--batch-size 0; expected 1 or more"),
        (("eval", "{saved}/packed", "--data", "digits", "--device", "abacus"), "--device 'abacus': "),
        (("eval", "{saved}", "--data", "digits"), "{saved} has no config.json"),
        (("analyze", "{saved}/float", "--data", "{images}"), "{saved}/float is a float model; expected one that"),
        (("analyze", "{saved}/packed", "--data", "digits", "--output", "a.pdf"), "--output a.pdf: expected the name"),
        (("analyze", "{saved}/packed", "--data", "digits", "--output", "no/a.html"), "there is no directory"),
    ],
)
def test_mistakes_in_one_line(argv, message, saved, images, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *(text.format(saved=saved, images=images) for text in argv))
    assert (status, out) == (1, "") and message.format(saved=saved) in err and not list(tmp_path.iterdir())


def test_classes_without_names_have_the_order_of_the_data():
    class Model:
        class config:
            id2label = {0: "LABEL_0", 1: "LABEL_1"}

    assert numbers_of_classes(["b", "a"], Model, "x") == [0, 1]
    with pytest.raises(ValueError, match="3 of its 3 classes are none of the model's, such as 'a'"):
        numbers_of_classes(["a", "b", "c"], Model, "x")
    Model.config.id2label = {0: "crane", 1: "bee", 2: "crane"}  # as ImageNet has the bird and the machine
    assert numbers_of_classes(["bee"], Model, "x") == [1]
    with pytest.raises(ValueError, match="2 classes of the model are called 'crane', so that it is not known which"):
        numbers_of_classes(["crane"], Model, "x")

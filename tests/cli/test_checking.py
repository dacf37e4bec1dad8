"""What a command would refuse or leave out at its end, after minutes of measuring, is refused at its beginning."""

from __future__ import annotations

import pytest
from test_kinds_of_models import quantized, save
from test_looking import on, run
from tiny_models import resnet, vit

from hf_saq.cli import checking, looking, saved_images


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--points", 4), "--points 4; expected an odd number >= 3"),
        (("--points", 1), "--points 1; expected an odd number >= 3"),
        (("--rho", 0), "--rho 0; expected a finite number > 0"),
        (("--rho", "nan"), "--rho nan; expected a finite number > 0"),
        (("--passes", "nan"), "--passes nan; expected a number > 0"),
        (("--output", "page.html/"), "--output page.html: is a directory; expected the name of a file"),
        (("--landscape", "plane.txt"), "--landscape plane.txt: .txt is no format of pictures; expected one of "),
        (("--landscape", "no/plane.png"), "--landscape no/plane.png: there is no directory "),
        (("--landscape", "a.png", "--parts", "sharpness"), "--landscape is for landscape alone, but --parts is sharp"),
        (("--beside", "b", "--parts", "sensitivity"), "--beside is for sharpness and landscape alone, but --parts is"),
        (("--float", "f", "--parts", "landscape", "sharpness"), "--float is for sensitivity alone, but --parts is la"),
    ],
)
def test_an_analysis_checks_what_it_was_told_before_it_loads_anything(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").mkdir()
    monkeypatch.setattr(looking, "load_model", None)
    status, out, err = run(capsys, "analyze", "nowhere", "--data", "nothing", "--output", "a.html", *argv)
    assert (status, out) == (1, "") and message in err and [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("file", ["layers.txt", "no/layers.svg"])
def test_a_picture_of_layers_is_checked_before_anything_is_loaded(file, capsys, monkeypatch):
    monkeypatch.setattr(looking, "load_model", None)
    status, _, err = run(capsys, "compare", "a", "b", "--data", "nothing", "--plot", file)
    assert status == 1 and f"--plot {file}: " in err


def test_matplotlib_is_asked_for_at_once(capsys, monkeypatch):
    monkeypatch.setattr(looking, "load_model", None)
    monkeypatch.setattr(checking, "find_spec", lambda name: None)
    for argv in (("compare", "a", "b", "--plot", "a.svg"), ("analyze", "a", "--landscape", "a.png")):
        status, _, err = run(capsys, *argv, "--data", "nothing")
        assert status == 1 and "matplotlib is not installed; expected it for pictures: pip install" in err


@pytest.mark.parametrize("other", ["packed", "resnet"])
def test_the_float_model_is_checked_before_images_are_read(other, saved, images, capsys, tmp_path, monkeypatch):
    """Also whether it is the one that was quantized: any other has sensitivities of its own."""
    monkeypatch.setattr(looking, "load_images", None)
    directory, wrong = saved / "packed", " is quantized; expected a float model."
    if other == "resnet":
        directory = save(resnet(), tmp_path / "resnet")
        wrong = f" is a ResNetForImageClassification with other parameters than {saved}/latent, such as vit.embed"
    argv = ("analyze", saved / "latent", *on(images), "--float", directory, "--output", tmp_path / "a.html")
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert f"--float {directory}{wrong}" in err


@pytest.mark.parametrize("command", ["eval", "compare", "analyze"])
def test_a_model_of_another_task_is_named(command, images, capsys, tmp_path, monkeypatch):
    """As one of segmentation is, whose scores are those of pixels."""
    directory = save(quantized(vit()), tmp_path / "model")
    scores = saved_images.logits_of
    monkeypatch.setattr(
        saved_images, "logits_of", lambda output: scores(output)[:, :, None, None].expand(-1, -1, 4, 4)
    )
    argv = (command, directory, *((directory,) if command == "compare" else ()), *on(images))
    page = ("--output", tmp_path / "a.html") if command == "analyze" else ()
    status, out, err = run(capsys, *argv, *page)
    assert (status, out) == (1, "") and not (tmp_path / "a.html").exists()
    assert "ViTForImageClassification returns scores (5, 3, 4, 4) for 5 images; expected (5, 3), one score for" in err

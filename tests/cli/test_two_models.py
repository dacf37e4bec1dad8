"""`hf-saq compare` and `analyze --beside`, `--float`: two models are kept apart, and shown images fit for both."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
from test_looking import on, run
from transformers import ConvNextImageProcessor, ViTImageProcessor

from hf_saq.analysis import sharpness
from hf_saq.cli.saved_images import differences_of_processors

SQUARE = {"height": 16, "width": 16}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_models_of_one_name_are_both_there(saved, images, capsys, tmp_path):
    """In the report each has the numbers that it has alone."""
    other, page = tmp_path / "other" / "latent", tmp_path / "page.html"
    other.parent.mkdir()
    shutil.copytree(saved / "packed", other)
    argv = (*on(images), "--output", page, "--json", "--parts", "landscape", "--points", 3)
    found = json.loads(run(capsys, "analyze", saved / "latent", "--beside", other, *argv)[1])
    alone = [json.loads(run(capsys, "analyze", model, *argv)[1]) for model in (saved / "latent", other)]
    for part in ("Landscape along a line", "Landscape over a plane"):
        by_name = {(s["name"], s["place"]): s for s in found[part]["surfaces"]}
        assert {name for name, _ in by_name} == {str(saved / "latent"), str(other)}
        for name, each in zip((saved / "latent", other), alone, strict=True):
            for surface in each[part]["surfaces"]:
                assert by_name[str(name), surface["place"]]["losses"] == surface["losses"]


def test_two_models_are_as_sharp_as_what_both_have_in_scope(saved, images, capsys, tmp_path, monkeypatch):
    """Of a float model the embeddings moved as well. Its sharpness is cut short here: the numbers that move count."""
    short = partial(sharpness, power_iterations=1, random_directions=1, trace_samples=2)
    monkeypatch.setattr("hf_saq.cli.looking.sharpness", short)
    argv = (*on(images), "--output", tmp_path / "page.html", "--json", "--parts", "sharpness")
    alone = json.loads(run(capsys, "analyze", saved / "latent", *argv)[1])["Sharpness of latent"]["elements"]
    found = json.loads(run(capsys, "analyze", saved / "latent", "--beside", saved / "float", *argv)[1])
    assert {found[f"Sharpness of {name}"]["elements"] for name in ("latent", "float")} == {alone}
    assert "such as embeddings of a float one, does not move" in (tmp_path / "page.html").read_text()


def test_a_model_beside_itself_is_refused(saved, images, capsys, tmp_path):
    argv = (*on(images), "--output", tmp_path / "page.html", "--parts", "sharpness")
    status, _, err = run(capsys, "analyze", saved / "latent", "--beside", f"{saved}/packed/../latent/", *argv)
    assert (
        status == 1
        and not list(tmp_path.iterdir())
        and f"latent/ is the model {saved}/latent itself; expected another one" in err
    )


@pytest.mark.parametrize("option", ["--beside", "--float", None])
def test_images_for_one_processor_are_not_shown_to_another_model(option, saved, images, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(saved / "float" if option == "--float" else saved / "packed", other)
    ViTImageProcessor(size=SQUARE, image_mean=[0.1] * 3, image_std=[0.5] * 3).save_pretrained(other)
    argv = ("compare", saved / "latent", other) if option is None else ("analyze", saved / "latent", option, other)
    part = "sensitivity" if option == "--float" else "sharpness"
    page = () if option is None else ("--output", tmp_path / "a.html", "--parts", part)
    status, out, err = run(capsys, *argv, *on(images), *page)
    assert (status, out) == (1, "") and not (tmp_path / "a.html").exists()
    assert f"processors of {saved}/latent and {other} differ: mean of each channel [0.5, 0.5, 0.5] and [0.1, 0" in err


def test_what_differs_is_named():
    def named(other) -> list[str]:
        return differences_of_processors(ViTImageProcessor(size=SQUARE, **HALVES), other)

    assert named(ConvNextImageProcessor(size={"shortest_edge": 16}, **HALVES)) == []  # says the same in another way
    other = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    other.do_flip_channel_order = True
    assert named(other) == [
        "standard deviation of each channel [0.5, 0.5, 0.5] and [0.2, 0.2, 0.2]",
        "size in pixels 16 and 32",
        "order of channels RGB and BGR",
    ]

"""A task that travels in one file: images and weights come back, mistakes are named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.accuracy import portable
from benchmarks.accuracy.sweep import is_at_hand
from benchmarks.accuracy.task import Data
from benchmarks.accuracy.tasks import TASKS, USUAL
from benchmarks.shared.images import Images


def smooth(count: int) -> Images:
    """Gradients of gray, which JPEG keeps to a step or two."""
    ramp = torch.linspace(0, 255, 16).expand(3, 16, 16)
    pixels = torch.stack([ramp.roll(k, -1) if k % 2 == 0 else ramp.mT for k in range(count)])
    return Images(pixels.to(torch.uint8), torch.arange(count))


@pytest.fixture
def travelling(monkeypatch):
    """A task of one linear layer, whose images are made here."""
    data = Data(smooth(5), smooth(9), smooth(7), lambda p, g: p, lambda p: p)  # noqa: ARG005
    task = dataclasses.replace(
        TASKS["flowers-vit-224"],
        load=lambda paths: data,  # noqa: ARG005
        build=lambda: torch.nn.Linear(3, 2),
        train_float=lambda paths, data, drawn, seed: torch.nn.Linear(3, 2),  # noqa: ARG005
        needs=(),
        decoded="images.safetensors",
    )
    monkeypatch.setitem(TASKS, "small", task)
    portable.images_of.cache_clear()
    portable.float_state.cache_clear()
    yield task
    portable.images_of.cache_clear()
    portable.float_state.cache_clear()


def given(tmp_path, cache: str) -> list[str]:
    return ["--task", "small", "--file", str(tmp_path / "packed"), "--count", "4", "--cache", str(tmp_path / cache)]


def test_images_and_weights_come_back(travelling, tmp_path, capsys):
    portable.main(["pack", *given(tmp_path, "here"), "--quality", "95"])
    portable.main(["unpack", *given(tmp_path, "there")])
    assert "5 train, 2 validation, 4 test images" in capsys.readouterr().out
    found = load_file(tmp_path / "there" / "images.safetensors")
    assert torch.equal(found["validation.labels"], torch.tensor([0, 1]))
    difference = found["train.pixels"].float() - smooth(5).pixels.float()
    assert found["train.pixels"].dtype == torch.uint8 and difference.abs().mean() < 3  # of 255
    before, after = (load_file(tmp_path / place / "small-float.safetensors") for place in ("here", "there"))
    assert all(torch.equal(after[name], before[name].half().float()) for name in before)
    args = portable.PortableArguments(task="small", cache=str(tmp_path / "there"))
    TASKS["small"] = dataclasses.replace(TASKS["small"], needs=("flowers",))
    paths = dataclasses.replace(args.paths(), flowers=tmp_path / "nowhere")
    assert is_at_hand("small", paths)  # what was made of the data is enough
    assert not is_at_hand("small", dataclasses.replace(paths, cache=tmp_path))


def test_mistakes(travelling, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\['carry'\]: expected pack or unpack"):
        portable.main(["carry"])
    with pytest.raises(ValueError, match="--task digits: cannot travel; expected one of"):
        portable.main(["pack", "--task", "digits"])
    with monkeypatch.context() as patch:
        patch.setattr(portable, "LIMIT", 100)
        with pytest.raises(ValueError, match=r"packed: 0.0 MB; expected at most 0. Lower --quality or --count"):
            portable.main(["pack", *given(tmp_path, "here")])
    assert not (tmp_path / "packed").exists()
    portable.main(["pack", *given(tmp_path, "here")])
    TASKS["small"] = dataclasses.replace(TASKS["small"], build=lambda: torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"\['weight'\] differ from the model of .*Pack it anew"):
        portable.main(["unpack", *given(tmp_path, "there")])
    assert not (tmp_path / "there").exists()


def test_tasks_that_take_the_settings_of_another():
    assert "flowers-vit-224" not in USUAL
    for name, task in TASKS.items():
        if task.tuned_as is not None:
            other = TASKS[task.tuned_as]
            assert other.tuned_as is None and other.learning_rates == task.learning_rates, name
            assert (other.tuned_at, other.trial_seeds) == (task.tuned_at, task.trial_seeds), name

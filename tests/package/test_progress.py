"""Bars come after two seconds, from calibration to analysis, and not where transformers has none."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from tiny_models import images, vit

from hf_saq import SAQQuantizationConfig, calibrate, pack, progress, quantize
from hf_saq.analysis import sharpness

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=4, scale_init="mean")


@pytest.fixture
def bars():
    """Tests have none otherwise."""
    transformers.utils.logging.enable_progress_bar()
    yield
    transformers.utils.logging.disable_progress_bar()


def work() -> None:
    model = calibrate(quantize(vit(), CONFIG), [images(2), images(2)])
    batch = {"pixel_values": images(2), "labels": torch.tensor([0, 1])}
    sharpness(model, [batch], 0.1, power_iterations=1, trace_samples=2)
    pack(model)


def test_short_work_shows_none(bars, capsys):
    work()
    assert capsys.readouterr().err == ""


def test_long_work_shows_one(bars, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_WITHOUT", 0.0)
    work()
    shown = capsys.readouterr().err
    for doing in ("first scales", "running batches", "sharpness", "packing"):
        assert f"{doing}:" in shown


def test_command_lines_show_ours_on_a_terminal_alone(monkeypatch, capsys):
    """Whatever they told transformers."""
    monkeypatch.setattr(progress, "SECONDS_WITHOUT", 0.0)
    with progress.bars_of_ours_alone():
        work()
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        work()
        assert "packing:" in capsys.readouterr().err
    work()
    assert capsys.readouterr().err == ""


def test_none_where_transformers_has_none(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_WITHOUT", 0.0)
    work()
    assert capsys.readouterr().err == ""

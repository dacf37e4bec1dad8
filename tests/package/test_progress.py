"""Bars come after two seconds, in calibration, first scales and packing, and not where transformers has none."""

from __future__ import annotations

import sys

import pytest
import transformers
from tiny_models import images, vit

from hf_saq import SAQQuantizationConfig, calibrate, pack, progress, quantize

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=4, scale_init="mean")


@pytest.fixture
def bars():
    """Tests have none otherwise."""
    transformers.utils.logging.enable_progress_bar()
    yield
    transformers.utils.logging.disable_progress_bar()


def work() -> None:
    pack(calibrate(quantize(vit(), CONFIG), [images(2), images(2)]))


def test_short_work_shows_none(bars, capsys):
    work()
    assert capsys.readouterr().err == ""


def test_long_work_shows_one(bars, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_WITHOUT", 0.0)
    work()
    shown = capsys.readouterr().err
    for doing in ("first scales", "running batches", "packing"):
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

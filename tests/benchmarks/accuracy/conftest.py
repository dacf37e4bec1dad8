"""A task small enough to run the whole sweep."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.accuracy.tasks import TASKS


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The task of digits, three steps long, with one candidate for the learning rate and two radii."""
    task = dataclasses.replace(
        TASKS["digits"], steps=3, learning_rates=(4e-3,), radii=(0.1, 0.3), trial_seeds=(100,), images_per_class=3
    )
    monkeypatch.setitem(TASKS, "digits", task)
    return [
        *("--tasks", "digits", "--bits", "2", "--seeds", "0", "1"),
        *("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")),
    ]

"""Stored runs: computed once, found again."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.shared.runs import Runs, versions_of


def test_two_studies_that_want_the_same_run(tmp_path):
    """Both get it, and it is trained once."""
    runs, trained = Runs(tmp_path, "python some.py"), []

    def train():
        trained.append(1)
        time.sleep(0.2)
        return {"test": 0.5}

    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(runs.once, "one", {"a": 1}, train) for _ in range(4)]
        assert [f.result()["outcome"] for f in found] == [{"test": 0.5}] * 4
    assert len(trained) == 1


def test_a_stored_run_with_other_arguments(tmp_path):
    runs = Runs(tmp_path, "python some.py")
    runs.once("a", {"steps": 1, "lr": 0.1}, lambda: {"test": 0.5})
    assert runs.once("a", {"steps": 1, "lr": 0.1}, lambda: {"test": 0.6})["outcome"] == {"test": 0.5}
    with pytest.raises(ValueError, match=r"a\.json: .*other arguments, \{'steps': \(1, 2\)\} \(stored, now\)"):
        runs.once("a", {"steps": 2, "lr": 0.1}, lambda: {"test": 0.6})


def test_a_run_that_fails_is_not_stored(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runs(tmp_path, "python some.py").once("a", {}, fail)
    assert not list(tmp_path.iterdir())


def test_versions_name_the_commits_that_had_them():
    made_with = [("3.11", "b"), ("3.11", "a"), ("3.12", "a"), ("3.11", "b"), ("3.13", None)]
    records = [{"versions": {"python": p, "torch": "2", **({"commit": c} if c else {})}} for p, c in made_with]
    assert versions_of(records) == [
        "python 3.11, torch 2, commits a, b",
        "python 3.12, torch 2, commit a",
        "python 3.13, torch 2",
    ]

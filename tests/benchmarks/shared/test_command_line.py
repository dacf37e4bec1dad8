"""Command lines: options, the command that is stored, and the paths of a page."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.shared.command_line import page_paths, parsed


@dataclass
class Some:
    """Options."""

    methods: list[str] = field(default_factory=lambda: ["qat"], metadata={"help": "Ways to train."})


def test_the_stored_command_runs_the_same_again():
    options, command = parsed(Some, ["--methods", "qat", "case 3"], "benchmarks.some.sweep", "About.\nMore.")
    assert options.methods == ["qat", "case 3"]
    assert shlex.split(command) == ["python", "-m", "benchmarks.some.sweep", "--methods", "qat", "case 3"]


def test_the_stored_command_says_nothing_of_one_machine(tmp_path):
    given = ["--methods", str(tmp_path / "cache"), f"{tmp_path}/a=b", "some/place"]
    options, command = parsed(Some, given, "a.b", "About.")
    assert options.methods == given[1:]
    assert command == "python -m a.b --methods cache a=b some/place"
    assert parsed(Some, [f"--methods={tmp_path}/c"], "a.b", "About.")[1] == "python -m a.b --methods=c"


def test_options_of_the_process_and_another_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--methods", "full"])
    options, command = parsed(Some, None, "a.b", "About.", "torchrun --nproc_per_node 2")
    assert options.methods == ["full"]
    assert command == "torchrun --nproc_per_node 2 -m a.b --methods full"


def test_help_tells_what_the_script_is_for(capsys):
    with pytest.raises(SystemExit):
        parsed(Some, ["--help"], "a.b", "Measures things.\n\nAt length.")
    told = capsys.readouterr().out
    assert "Measures things." in told and "Ways to train." in told and "At length" not in told


def test_paths_of_a_page(capsys):
    assert page_paths([], "About.", "here", "page.md") == (Path("here"), Path("page.md"))
    assert page_paths(["a", "b.md"], "About.", "here", "page.md") == (Path("a"), Path("b.md"))
    with pytest.raises(SystemExit):
        page_paths(["--help"], "About this page.", "here", "page.md")
    assert "About this page." in capsys.readouterr().out

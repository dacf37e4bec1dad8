"""The stages of the campaign: scripts of other rooms and their options, on a card or as a rehearsal on CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..shared.places import RESULTS

TASK = "flowers-vit-224"
METHODS = ("qat", "case 3", "balanced", "echo")
BITS = 4
WAYS = ("float", "qat", "full", "ascent 1/8", "previous", "echo 2")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: In the log and in the stored report.
        command: What is run.
        seconds: At most so long; it is then ended, which for `open_ended` stages is how they should end.
        open_ended: Whether it does as much as fits, one stored result after the other.
    """

    name: str
    command: list[str]
    seconds: float
    open_ended: bool = False


def module(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", name, *options]


def stages(results: Path, cache: Path, file: Path, rehearsal: bool, with_data: bool) -> list[Stage]:
    """List the stages in their order. Each has a limit of its own; `campaign.ENOUGH` ends them all.

    Args:
        results: Directory that they write below.
        cache: Directory for unpacked images and the float model.
        file: What `portable pack` wrote.
        rehearsal: Whether to run on CPU, at the smallest sizes.
        with_data: Whether `file` is there, to train on.
    """
    found = [Stage("tests", tests(results, rehearsal), 120)]
    for script in ("sweep", "launches"):
        for model, batch_size in [("vit-small-images", 2)] if rehearsal else [("vit-small", 64), ("resnet50", 64)]:
            options = ["--models", model, "--batch_sizes", str(batch_size), "--ways", *WAYS]
            options += ["--results", str(results / "step_cost"), "--steps", "1" if rehearsal else "4"]
            options += ["--rounds", "1" if rehearsal else "8", "--precision", "bfloat16"]
            options += [] if rehearsal else ["--device", "cuda", "--clock", "wall", "--backend", "compiled"]
            found.append(Stage(f"{script} {model}", module(f"benchmarks.step_cost.{script}", *options), 70))
    if with_data:
        packed = ["--file", str(file), "--cache", str(cache)]
        found.append(Stage("unpack", module("benchmarks.accuracy.portable", "unpack", *packed), 40))
    if with_data or rehearsal:
        found.append(Stage("training", training(results, cache, rehearsal), 300, open_ended=True))
    return found


def tests(results: Path, rehearsal: bool) -> list[str]:
    """Every test that CPU skips; the rehearsal collects them and sees them skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    return [*command, f"--junitxml={results / 'tests.xml'}"] + (["--collect-only"] if rehearsal else [])


def training(results: Path, cache: Path, rehearsal: bool) -> list[str]:
    """As many seeds as fit, all methods of a seed before the next one."""
    task, methods, bits = ("digits", METHODS[:2], 2) if rehearsal else (TASK, METHODS, BITS)
    seeds = ["0"] if rehearsal else [str(seed) for seed in range(24)]
    options = ["--tasks", task, "--bits", str(bits), "--methods", *methods, "--seeds", *seeds]
    options += ["--results", str(results / "accuracy"), "--trials", f"{RESULTS}/accuracy", "--cache", str(cache)]
    options += [] if rehearsal else ["--device", "cuda", "--processes", "6"]
    return module("benchmarks.accuracy.sweep", *options)

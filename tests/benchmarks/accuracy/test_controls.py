"""Controls that share with cheap schedules all but the perturbation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.accuracy import study, training
from benchmarks.accuracy.arguments import AccuracyArguments
from benchmarks.accuracy.methods import CLEAN_BATCHES, METHODS, QAT
from benchmarks.accuracy.task import Data
from benchmarks.accuracy.tasks import TASKS
from benchmarks.shared.images import Images

COUNT, BATCH = 60, 4


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Train a method for five steps on a net with a batch norm; returns its arguments, its outcome, and the net."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8 * 16, 3)),
        )

    images = Images(torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(COUNT) % 3)
    data = Data(images, images, images, lambda pixels, generator: pixels, lambda pixels: pixels)
    task = dataclasses.replace(
        TASKS["digits"], load=lambda paths: data, build=build, train_float=lambda *a: build(), float_per_seed=False
    )
    task = dataclasses.replace(task, images_per_class=None, batch_size=BATCH, steps=5)
    monkeypatch.setitem(TASKS, "digits", task)
    for cached in (training.images_of, training.float_state):
        cached.cache_clear()
    args = AccuracyArguments(tasks=["digits"], bits=[4], cache=str(tmp_path))
    trained = []
    seen = []
    original = training.fit

    def spied(model, batches, *rest):
        trained.append(model)
        return original(model, (seen.append(b["labels"]) or b for b in batches), *rest)

    monkeypatch.setattr(training, "fit", spied)

    def run(method):
        seen.clear()
        one = study.Study("digits", 4, args, args.paths(), None, None)
        arguments = one.arguments("run", 4, method, 0, 1e-3, None, None)
        outcome = training.train_one(arguments, args.paths())
        return arguments, outcome, trained[-1], list(seen)

    yield run
    for cached in (training.images_of, training.float_state):
        cached.cache_clear()


def test_echoed_batches_come_twice(train):
    _, plain, _, once = train(QAT)
    arguments, outcome, _, seen = train("qat, echoed batches")
    assert outcome["steps"] == plain["steps"] == 5 and outcome["passes"] == 1
    assert all(torch.equal(seen[i], once[i // 2]) for i in range(5)) and arguments["echoed"] is True


def test_clean_statistics_are_those_of_the_trained_weights(train):
    """Same weights as plain training; means over its next batches, each counted alike, instead of running ones."""
    _, _, plain, _ = train(QAT)
    arguments, outcome, clean, _ = train("qat, clean statistics")
    assert torch.equal(plain[3].weight, clean[3].weight) and outcome["steps"] == 5
    assert arguments["clean_batches"] == CLEAN_BATCHES == COUNT // BATCH
    assert not clean[1].training and clean[1].momentum == 0.1
    data = training.images_of("digits", AccuracyArguments(cache="x").paths())
    batches = data.training_batches(data.training, BATCH, 0)
    shown = [next(batches)["pixels"] for _ in range(5 + CLEAN_BATCHES)][5:]
    with torch.no_grad():
        means = torch.stack([plain[0](pixels).mean(dim=(0, 2, 3)) for pixels in shown])
    torch.testing.assert_close(clean[1].running_mean, means.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(clean[1].running_mean, plain[1].running_mean)


def test_runs_of_old_keep_their_arguments():
    """Methods that have nothing special tell nothing of it, so that stored runs are found again."""
    controls = {name for name, method in METHODS.items() if method.control}
    assert controls == {"qat, echoed batches", "qat, clean statistics", "balanced, radius matched"}
    one = study.Study("digits", 4, AccuracyArguments(), AccuracyArguments().paths(), None, None)
    known = study.Runs(Path("benchmarks/results/accuracy"), "").stored("digits-w4-qat-seed0")
    assert one.arguments("run", 4, QAT, 0, known["arguments"]["lr"], None, 15) == known["arguments"]

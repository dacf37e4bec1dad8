"""Tasks and methods of the accuracy sweep, without their data."""

from __future__ import annotations

from benchmarks.accuracy.methods import METHODS, QAT, SAQ
from benchmarks.accuracy.tasks import TASKS


def test_every_task_builds_the_model_that_it_quantizes():
    """Architectures of the tasks, without their data: all layers that have weights get quantizers."""
    for name, task in TASKS.items():
        assert sum(p.numel() for p in task.build().parameters()) > 5_000, name
        assert task.trial_seeds and not set(task.trial_seeds) & set(range(20)), name


def test_passes_of_the_methods():
    """Two passes cost twice, whether as SAQ or as twice the steps; the preset climbs on an eighth of the batch."""
    assert [METHODS[m].passes for m in (QAT, SAQ, "qat, twice the steps", "balanced")] == [1, 2, 2, 1.125]

"""Every schedule in `SAQTrainer` against a plain-PyTorch loop: the same parameters, and as many passes as it says."""

from __future__ import annotations

from functools import cache

import pytest
from reference import largest_difference
from training import BATCH, make_trainer, scheduled_reference

TOLERANCE = 1e-11
"""Of float64 parameters after the steps below; they move by more than 1e-5."""

STEPS = 4
RUNS = [
    ("vit", 3, 1, "local", dict(interval=2)),
    ("resnet", 3, 2, "local", dict(ascent_fraction=0.5)),
    ("vit", 2, 2, "global", dict(ascent_fraction=0.3, interval=3, start=0.3)),
    ("vit", 3, 1, "local", dict(reuse="stale", interval=3)),
    ("resnet", 3, 2, "local", dict(reuse="stale", interval=2, start=0.3)),
    ("vit", 1, 2, "global", dict(reuse="stale", interval=2, ascent_fraction=0.5)),
    ("vit", 3, 2, "local", dict(reuse="previous")),
    ("resnet", 3, 1, "local", dict(reuse="previous")),
    ("vit", 1, 1, "local", dict(reuse="previous", start=0.3)),
    ("vit", 2, 2, "global", dict(reuse="previous")),
    ("vit", 3, 1, "local", dict(reuse="look", interval=3)),
    ("resnet", 3, 2, "local", dict(reuse="look", interval=2)),
    ("vit", 1, 2, "global", dict(reuse="look", interval=2, start=0.3)),
    ("vit", 2, 1, "local", dict(reuse="look", interval=2)),
    ("vit", 3, 1, "local", dict(trigger=True)),
    ("resnet", 3, 2, "local", dict(trigger=True)),
    ("vit", 1, 2, "local", dict(trigger=True)),
    ("vit", 2, 2, "global", dict(trigger=True, start=0.3)),
]
IDS = [f"{f}-case{c}-x{a}-{s}-" + "-".join(f"{k}={v}" for k, v in knobs.items()) for f, c, a, s, knobs in RUNS]


def expected_samples(kinds: list[str], fraction: float) -> list[int]:
    """Samples that go through the model in each step, for each micro-batch."""
    first_pass = {"two passes": -(-BATCH * round(fraction * 10) // 10), "fired": BATCH}
    return [BATCH + first_pass.get(kind, 0) for kind in kinds]


@cache
def every_step(family, case, accumulation, sync):
    """Two passes in every step: where a run would end on which its knobs had no effect."""
    return scheduled_reference(family, case, accumulation, sync, {}, count=STEPS)[0]


@pytest.mark.parametrize(("family", "case", "accumulation", "sync", "knobs"), RUNS, ids=IDS)
def test_training_equals_the_reference(family, case, accumulation, sync, knobs, tmp_path):
    trainer = make_trainer(family, case, accumulation, sync, tmp_path, knobs=knobs, max_steps=STEPS)
    samples, backwards = [0] * STEPS, [0] * STEPS

    def count(module, args, kwargs, output):
        samples[trainer.state.global_step] += len(output.logits)

    trainer.model.register_forward_hook(count, with_kwargs=True)
    backward = trainer.accelerator.backward

    def counted(loss, **kwargs):
        backwards[trainer.state.global_step] += 1
        backward(loss, **kwargs)

    trainer.accelerator.backward = counted
    trainer.train()
    expected, kinds = scheduled_reference(family, case, accumulation, sync, knobs, count=STEPS)
    assert largest_difference(trainer.model, expected) < TOLERANCE
    fraction = knobs.get("ascent_fraction", 1)
    assert samples == [accumulation * n for n in expected_samples(kinds, fraction)]
    assert backwards == [accumulation * (2 if kind in ("two passes", "fired") else 1) for kind in kinds]
    assert largest_difference(trainer.model, every_step(family, case, accumulation, sync)) > 1e3 * TOLERANCE

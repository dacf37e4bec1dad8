"""When to perturb: pure functions of the step, the trigger against numpy, parts of batches."""

from __future__ import annotations

import itertools
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from hf_saq.sharpness.schedules.partial_batch import batch_size, first_samples
from hf_saq.sharpness.schedules.schedule import PRESETS, PerturbationSchedule, resolve_preset
from hf_saq.sharpness.schedules.trigger import NormTrigger

ACTIONS = [
    (dict(), "2222222222"),
    (dict(interval=3), "2112112112"),
    (dict(start=0.25), "1112222222"),  # a quarter of ten steps is over after three
    (dict(start=0.25, interval=2), "1112121212"),
    (dict(start=1.0), "1111111111"),
    (dict(reuse="stale", interval=4), "2rrr2rrr2r"),
    (dict(reuse="look", interval=2, start=0.5), "111112r2r2"),
    (dict(reuse="previous", start=0.3), "111rrrrrrr"),
    (dict(trigger=True, start=0.9), "111111111w"),
]
LETTERS = {"plain": "1", "two passes": "2", "reuse": "r", "watch": "w"}


@pytest.mark.parametrize(("knobs", "expected"), ACTIONS)
def test_actions(knobs, expected):
    schedule = PerturbationSchedule(**knobs)
    assert "".join(LETTERS[schedule.action(step, 10)] for step in range(10)) == expected


@pytest.mark.parametrize("knobs", [knobs for knobs, _ in ACTIONS] + [dict(ascent_fraction=0.25, interval=2)])
def test_cost_is_that_of_the_actions(knobs):
    """Over so many steps that the first one does not matter."""
    schedule = PerturbationSchedule(**knobs)
    passes = {"plain": 1, "two passes": 1 + schedule.ascent_fraction, "reuse": 1, "watch": 2}
    counted = sum(passes[schedule.action(step, 12000)] for step in range(12000)) / 12000
    assert schedule.cost == pytest.approx(counted, abs=1e-3)


REFUSED = [
    (dict(reuse="stale"), "reuse='stale' with interval=1 would renew at every step"),
    (dict(reuse="look"), "reuse='look' with interval=1 would renew at every step"),
    (dict(reuse="look", interval=2, ascent_fraction=0.5), "must come from the same images"),
    (dict(reuse="previous", interval=2), "from its only pass. Leave interval"),
    (dict(reuse="previous", ascent_fraction=0.5), "from its only pass. Leave interval"),
    (dict(trigger=True, interval=2), "the trigger alone decides"),
    (dict(trigger=True, reuse="previous"), "the trigger alone decides"),
    (dict(trigger=True, reuse="stale", interval=2), "the trigger alone decides"),
    (dict(trigger=True, ascent_fraction=0.5), "must therefore see the whole batch"),
]


@pytest.mark.parametrize(("knobs", "reason"), REFUSED)
def test_contradictions_are_refused_with_a_reason(knobs, reason):
    with pytest.raises(ValueError, match=reason):
        PerturbationSchedule(**knobs)


def test_every_pair_is_either_refused_above_or_works():
    values = dict(interval=(1, 2), ascent_fraction=(1.0, 0.5), reuse=(None, "stale", "previous", "look"))
    for combination in itertools.product(*values.values(), (False, True), (0.0, 0.5)):
        knobs = dict(zip([*values, "trigger", "start"], combination, strict=True))
        given = {k: v for k, v in knobs.items() if v != getattr(PerturbationSchedule(), k)}
        expected = any(refused.items() <= given.items() for refused, _ in REFUSED if refused.keys() != {"reuse"})
        expected |= knobs["reuse"] in ("stale", "look") and knobs["interval"] == 1
        try:
            PerturbationSchedule(**knobs)
        except ValueError:
            assert expected, knobs
        else:
            assert not expected, knobs


def test_presets():
    costs = {name: PerturbationSchedule(**resolve_preset(name, {})).cost for name in PRESETS}
    assert costs == {"full": 2.0, "balanced": 1.125, "free": 1.0}
    assert resolve_preset(None, {"interval": 3, "reuse": None}) == {**PRESETS["full"], "interval": 3}
    assert resolve_preset(None, {"interval": None}) == PRESETS["balanced"]
    assert resolve_preset("balanced", {"ascent_fraction": 0.125}) == PRESETS["balanced"]
    with pytest.raises(ValueError, match="schedule='balanced' means interval=1, but interval=5 is given as well"):
        resolve_preset("balanced", {"interval": 5})
    with pytest.raises(ValueError, match="schedule='cheap'; expected one of"):
        resolve_preset("cheap", {})


def test_trigger_follows_the_running_statistics():
    """Against the closed form of the mean and the formulas of the paper, in three phases of training."""
    squares = np.random.default_rng(0).gamma(2.0, 1.0, 200)
    for progress in (0.0, 0.5, 0.9):
        trigger, fired = NormTrigger(), []
        for square in squares:
            fired.append(trigger.fires(float(square), progress))
        weights = 0.9 ** np.arange(199, -1, -1) * np.r_[1, np.full(199, 0.1)]  # the mean starts at the first value
        assert trigger.mean == pytest.approx(np.dot(weights, squares))
        mean, variance, expected = None, 0.0, []
        for square in squares:
            mean = square if mean is None else 0.9 * mean + 0.1 * square
            variance = 0.9 * variance + 0.1 * (square - mean) ** 2
            expected.append(square >= mean + (1 - 2 * progress) * math.sqrt(variance))
        assert fired == expected
        assert {0.0: 0.1, 0.5: 0.3, 0.9: 0.6}[progress] < np.mean(fired) < {0.0: 0.3, 0.5: 0.6, 0.9: 0.95}[progress]


def test_trigger_ignores_what_is_not_finite():
    trigger = NormTrigger()
    trigger.fires(2.0, 0.5)
    before = (trigger.mean, trigger.variance)
    assert not trigger.fires(math.inf, 1.0) and not trigger.fires(math.nan, 1.0)
    assert (trigger.mean, trigger.variance) == before


# Parts of batches ---------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(8, 0.25, 2), (10, 0.3, 3), (10, 0.31, 4), (10, 0.7, 7), (3, 0.01, 2), (8, 0.125, 2), (1, 0.5, 1), (5, 1.0, 5)],
)
def test_the_first_samples_of_any_structure(size, fraction, count):
    x, y = torch.randn(size, 3, 4), torch.arange(size)
    weights, name = torch.randn(13), "batch"
    for batch in (
        {"pixel_values": x, "labels": y, "weights": weights, "name": name},
        BatchFeature({"pixel_values": x, "labels": y}),
        (x, y),
        [x, y],
        Pair(x, y),
        {"inputs": {"x": x}, "targets": [y, x]},
        x,
    ):
        part = first_samples(batch, fraction)
        assert type(part) is type(batch) and batch_size(batch) == size
        flat = torch.utils._pytree.tree_flatten(dict(part) if isinstance(part, BatchFeature) else part)[0]
        whole = torch.utils._pytree.tree_flatten(dict(batch) if isinstance(batch, BatchFeature) else batch)[0]
        assert len(flat) == len(whole)
        for a, b in zip(flat, whole, strict=True):
            assert a == b if isinstance(b, str) else torch.equal(a, b if b is weights else b[:count])


@pytest.mark.parametrize("batch", [{"labels": [1, 2]}, {"scale": torch.tensor(1.0)}, "image", []])
def test_a_batch_without_samples_is_refused(batch):
    with pytest.raises(ValueError, match="ascent_fraction: the batch is a .* no tensor has a batch dimension"):
        first_samples(batch, 0.5)

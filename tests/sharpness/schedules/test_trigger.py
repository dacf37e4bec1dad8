"""The trigger against numpy and the formulas of its paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_saq.sharpness.schedules.rules.trigger import NormTrigger


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

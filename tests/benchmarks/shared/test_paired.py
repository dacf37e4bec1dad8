"""Paired differences against hand calculation."""

from __future__ import annotations

import math

import pytest

from benchmarks.shared.paired import Difference, average, difference, half_width


def test_differences_are_paired():
    """Seeds 0, 1, 2 are shared; differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027."""
    found = difference({0: 81.0, 1: 83.0, 2: 85.0, 9: 0.0}, {0: 80.0, 1: 81.0, 2: 82.0, 7: 0.0})
    assert found is not None and found.values == [1.0, 2.0, 3.0] and found.sign == 0
    assert str(found) == "+2.00 [-0.48, +4.48]"
    assert difference({0: 1.0, 1: 1.1, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0}).sign == 1
    assert difference({0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.0}).sign == -1
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_an_average_has_the_interval_of_welch_and_satterthwaite():
    """Means 2 and 6, both of three values with standard deviation 1: 4 degrees of freedom, t(0.975, 4) = 2.7764."""
    one, two = Difference([1.0, 2.0, 3.0], 0.0), Difference([5.0, 6.0, 7.0], 0.0)
    found = average([one, two])
    assert found.mean == 4.0 and found.half_width == pytest.approx(2.7764 * math.sqrt(1 / 6), rel=1e-4)
    # The other one knows its mean: what is left is a half of the first one's error, with that one's freedom.
    sure = Difference([6.0, 6.0, 6.0, 6.0], 0.0)
    assert average([one, sure]).half_width == pytest.approx(4.3027 * math.sqrt(1 / 3) / 2, rel=1e-4)
    assert average([sure, sure]).half_width == 0.0
    assert average([one]).half_width == pytest.approx(half_width([1.0, 2.0, 3.0]))


def test_the_interval_is_students():
    """Differences 0, 1, 2: standard deviation 1, t(0.975, 2) = 4.3027."""
    assert half_width([0.0, 1.0, 2.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(half_width([1.0]))
    shared = difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    alone = difference({0: 1.0}, {0: 0.0})
    assert shared is not None and shared.error == shared.half_width
    assert alone is not None and alone.error == 0 and str(alone) == "+1.00"

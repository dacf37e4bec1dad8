"""When to perturb: pure functions of the step."""

from __future__ import annotations

import itertools

import pytest

from hf_saq.sharpness.schedules import PRESETS, PerturbationSchedule, resolve_preset

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
    *(
        (dict(ascent_depth=0.5, **knobs), "ascent_depth=0.5 with ascent_fraction=.*both passes are of one whole batch")
        for knobs in (
            dict(ascent_fraction=0.5),
            dict(trigger=True),
            dict(reuse="previous"),
            *(dict(reuse=reuse, interval=2) for reuse in ("stale", "echo", "look")),
        )
    ),
]


@pytest.mark.parametrize(("knobs", "reason"), REFUSED)
def test_contradictions_are_refused_with_a_reason(knobs, reason):
    with pytest.raises(ValueError, match=reason):
        PerturbationSchedule(**knobs)


def test_every_pair_is_either_refused_above_or_works():
    values = dict(
        interval=(1, 2), ascent_fraction=(1.0, 0.5), ascent_depth=(1.0, 0.5), reuse=(None, "stale", "previous", "look")
    )
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
    assert costs == {"full": 2.0, "balanced": 1.125, "last_layers": 1.125, "free": 1.0}
    assert resolve_preset(None, {"interval": 3, "reuse": None}) == {**PRESETS["full"], "interval": 3}
    assert resolve_preset(None, {"interval": None}) == PRESETS["balanced"]
    assert resolve_preset("balanced", {"ascent_fraction": 0.125}) == PRESETS["balanced"]
    with pytest.raises(ValueError, match="schedule='balanced' means interval=1, but interval=5 is given as well"):
        resolve_preset("balanced", {"interval": 5})
    with pytest.raises(ValueError, match="schedule='cheap'; expected one of"):
        resolve_preset("cheap", {})

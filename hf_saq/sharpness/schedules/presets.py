"""Name some settings of the knobs: the presets."""

from __future__ import annotations

from typing import Any

FULL: dict[str, Any] = {
    "interval": 1,
    "ascent_fraction": 1.0,
    "ascent_depth": 1.0,
    "reuse": None,
    "trigger": False,
    "match_radius": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "balanced": {**FULL, "ascent_fraction": 0.125},
    "last_layers": {**FULL, "ascent_depth": 0.125},
    "free": {**FULL, "interval": 2, "reuse": "echo"},
}
"""Name of a preset -> its knobs, for 2, 1.125, at most 1.125 and 1 passes.

In docs/schedules.md `balanced` is one of the cheapest that keep at least nine tenths of the gain of `full`.
`last_layers` keeps most of it on MobileNetV2, where `balanced` does not (docs/results.md), and less on models of few
layers, whose last eighth is hardly more than the head. `free` is the way without a second pass that keeps most of it
where images are seen many times (docs/schedules.md, docs/ways.md); in a few epochs it loses to plain training.
"""

DEFAULT_PRESET = "balanced"


def resolve_preset(schedule: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Fill in the knobs that are `None` in `given`, as the preset `schedule` has them.

    Without a preset, and with no knob given, all are those of the default preset; with some given, the others are as
    in "full".

    Raises:
        ValueError: If there is no such preset or a given knob contradicts it. The message starts with a field's name.
    """
    if schedule is not None and schedule not in PRESETS:
        raise ValueError(f"schedule={schedule!r}; expected one of {[None, *PRESETS]}.")
    explicit = {name: value for name, value in given.items() if value is not None}
    preset = PRESETS[schedule or ("full" if explicit else DEFAULT_PRESET)]
    for name, value in explicit.items() if schedule is not None else ():
        if value != preset[name]:
            raise ValueError(
                f"schedule={schedule!r} means {name}={preset[name]!r}, but {name}={value!r} is given as well. Leave "
                "one of them out."
            )
    return {**preset, **explicit}

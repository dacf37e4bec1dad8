"""Name some settings of the knobs: the presets."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "full": {"interval": 1, "ascent_fraction": 1.0, "ascent_depth": 1.0, "reuse": None, "trigger": False, "match_radius": False},
    "balanced": {"interval": 1, "ascent_fraction": 0.125, "ascent_depth": 1.0, "reuse": None, "trigger": False, "match_radius": False},
    "free": {"interval": 2, "ascent_fraction": 1.0, "ascent_depth": 1.0, "reuse": "echo", "trigger": False, "match_radius": False},
}
"""Name of a preset -> its knobs, for 2, 1.125 and 1 passes. In docs/schedules.md `balanced` is one of the cheapest
that keep at least nine tenths of the gain of `full`; `free` is the way without a second pass that keeps most of it,
there and in docs/ways.md, where images are seen many times; in a few epochs it loses to plain training."""

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

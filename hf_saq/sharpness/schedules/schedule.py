"""When to perturb and what to reuse. Pure functions of the step: processes decide alike, a resumed run goes on alike.

Cost of one optimizer step, in forward+backward passes; a plain step costs 1, the full sharpness-aware step 2:

| knob                    | what it does                                                        | cost            |
|-------------------------|---------------------------------------------------------------------|-----------------|
| `interval=k`            | perturb every k-th step, plain steps between                        | 1 + 1/k         |
| `start=f`               | perturb once a fraction f of training is over                       | 2 - f           |
| `ascent_fraction=1/q`   | `eps` from the first 1/q of each micro-batch                        | 1 + 1/q         |
| `reuse="stale"`         | renew `eps` every k-th step; one pass at `Q(w) + eps` between       | 1 + 1/k         |
| `reuse="previous"`      | `eps` from the gradient that the only pass of the step before gave  | 1               |
| `reuse="look"`          | keep a component of every k-th gradient, add it to those between    | 1 + 1/k         |
| `trigger`               | perturb when the gradient is long against its running mean          | 1 + fired share |

What goes together. `start` goes with everything, and so do all cases, `adaptive` and both kinds of `sync`:

|                      | `interval` >= 2          | `ascent_fraction` < 1                   | `trigger`         |
|----------------------|--------------------------|-----------------------------------------|-------------------|
| `interval` >= 2      |                          | yes: 1 + f/k                            | no: both say when |
| `reuse="stale"`      | needed                   | yes: 1 + f/k                            | no: both say when |
| `reuse="previous"`   | no: every step is a link | no: there is no first pass              | no: both say when |
| `reuse="look"`       | needed                   | no: compares two gradients of one batch | no: both say when |
| `trigger`            | no: both say when        | no: its first pass may be the only one  |                   |

Under FSDP2: `interval`, `start`, `ascent_fraction` and `reuse="stale"`. The others read gradients that exist there
only averaged over processes and in shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Reuse = Literal["stale", "previous", "look"]
Action = Literal["plain", "two passes", "reuse", "watch"]

KNOBS = ("interval", "ascent_fraction", "reuse", "trigger")
"""What a preset decides."""

PRESETS: dict[str, dict[str, Any]] = {
    "full": {"interval": 1, "ascent_fraction": 1.0, "reuse": None, "trigger": False},
    "balanced": {"interval": 1, "ascent_fraction": 0.125, "reuse": None, "trigger": False},
    "free": {"interval": 1, "ascent_fraction": 1.0, "reuse": "previous", "trigger": False},
}
"""Knobs by the name of a preset, for 2, 1.125 and 1 passes. In docs/schedules.md `balanced` is the cheapest of those
that keep at least nine tenths of the gain of `full`; `free` is the one without a second pass."""

DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class PerturbationSchedule:
    """The knobs of the tables above.

    Args:
        interval: 1 perturbs every step. With `reuse`, how often what is reused is renewed.
        start: 0 perturbs from the first step, 1 never.
        ascent_fraction: Share of a micro-batch's samples, in (0, 1], that the first pass sees; two at least.
        reuse: What the steps between take from earlier ones.
        trigger: Decide by the gradient norm, see [`NormTrigger`].
        look_alpha: Length of what `reuse="look"` adds, relative to the gradient.

    Raises:
        ValueError: If a knob is out of range or two contradict each other. The message starts with a knob's name.
    """

    interval: int = 1
    start: float = 0.0
    ascent_fraction: float = 1.0
    reuse: Reuse | None = None
    trigger: bool = False
    look_alpha: float = 0.7

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval={self.interval!r}; expected an integer >= 1.")
        if not _is_number(self.start) or not 0 <= self.start <= 1:
            raise ValueError(f"start={self.start!r}; expected a fraction of training from 0 to 1.")
        if not _is_number(self.ascent_fraction) or not 0 < self.ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction={self.ascent_fraction!r}; expected a share of a batch, > 0 and <= 1.")
        if self.reuse not in (None, "stale", "previous", "look"):
            raise ValueError(f"reuse={self.reuse!r}; expected one of [None, 'stale', 'previous', 'look'].")
        if not isinstance(self.trigger, bool):
            raise ValueError(f"trigger={self.trigger!r}; expected True or False.")
        if not _is_number(self.look_alpha) or not 0 <= self.look_alpha < math.inf:
            raise ValueError(f"look_alpha={self.look_alpha!r}; expected a finite number >= 0.")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.trigger:
            if self.interval > 1 or self.reuse is not None:
                raise ValueError(
                    f"trigger=True with interval={self.interval}, reuse={self.reuse!r}: the trigger alone decides "
                    "which steps are perturbed. Leave interval and reuse out, or the trigger."
                )
            if self.ascent_fraction < 1:
                raise ValueError(
                    f"trigger=True with ascent_fraction={self.ascent_fraction}: a step that is not perturbed uses the "
                    "gradient of the first pass, which must therefore see the whole batch. Leave one of them out."
                )
        if self.reuse in ("stale", "look") and self.interval < 2:
            raise ValueError(
                f"reuse={self.reuse!r} with interval=1 would renew at every step what it keeps, at full cost. Set "
                "interval to 2 or more."
            )
        if self.reuse == "previous" and (self.interval > 1 or self.ascent_fraction < 1):
            raise ValueError(
                f"reuse='previous' with interval={self.interval}, ascent_fraction={self.ascent_fraction}: every step "
                "makes the eps of the next one from its only pass. Leave interval and ascent_fraction out."
            )
        if self.reuse == "look" and self.ascent_fraction < 1:
            raise ValueError(
                f"reuse='look' with ascent_fraction={self.ascent_fraction}: the clean and the perturbed gradient that "
                "it compares must come from the same images. Leave ascent_fraction out, or use reuse='stale'."
            )

    @property
    def cost(self) -> float:
        """Forward+backward passes per step over a whole training; with `trigger`, what it costs at most."""
        if self.reuse == "previous":
            return 1.0
        return 1 + (1 - self.start) * self.ascent_fraction / self.interval

    @property
    def has_state(self) -> bool:
        """Whether a step depends on earlier ones by more than the weights."""
        return self.reuse is not None or self.trigger

    @property
    def kind(self) -> str:
        """What decides how state is to be read."""
        return "trigger" if self.trigger else f"reuse={self.reuse!r}"

    def action(self, step: int, total_steps: int) -> Action:
        """What optimizer step `step` (0-based) of `total_steps` does.

        `"plain"` and `"two passes"` are what they say; `"reuse"` is one pass with what earlier steps left; `"watch"`
        is a plain pass after which the trigger decides on a second one.
        """
        first = ceil_of_product(self.start, total_steps)
        if step < first:
            return "plain"
        if self.trigger:
            return "watch"
        if self.reuse == "previous":
            return "reuse"
        if (step - first) % self.interval == 0:
            return "two passes"
        return "plain" if self.reuse is None else "reuse"


def resolve_preset(schedule: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Knobs of the preset `schedule`, with those in `given` that are not `None`.

    Without a preset they are those of the default one; or, where some are given, the others are as in "full".

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


def ceil_of_product(fraction: float, count: int) -> int:
    """`ceil(fraction * count)` that takes 0.07 * 100 for 7, not for 8."""
    return math.ceil(fraction * count - 1e-9 * max(count, 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

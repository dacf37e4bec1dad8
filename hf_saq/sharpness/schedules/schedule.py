"""Decide when to perturb and what to reuse.

All decisions are pure functions of the step: processes decide alike, and a resumed run goes on alike. (Except
`trigger`, which decides by gradients that are averaged over processes.)

Cost of one optimizer step, in forward+backward passes; a plain step costs 1, the full sharpness-aware step 2:

| knob                    | what it does                                                        | cost            |
|-------------------------|---------------------------------------------------------------------|-----------------|
| `interval=k`            | perturb every k-th step, plain steps between                        | 1 + 1/k         |
| `start=f`               | perturb once a fraction f of training is over                       | 2 - f           |
| `ascent_fraction=1/q`   | `eps` from the first 1/q of each micro-batch                        | 1 + 1/q         |
| `ascent_depth=1/q`      | perturb the last layers, with 1/q of the operations, alone          | 1 + 1/q, less   |
| `reuse="stale"`         | renew `eps` every k-th step; one pass at `Q(w) + eps` between       | 1 + 1/k         |
| `reuse="previous"`      | `eps` from the gradient that the only pass of the step before gave  | 1               |
| `reuse="echo"`          | use each batch k steps in a row, perturb all but the first of them  | 1               |
| `reuse="look"`          | keep a component of every k-th gradient, add it to those between    | 1 + 1/k         |
| `match_radius`          | adapt the radius of an `eps` of a part of its batch, or of the model | + 1/64          |
| `trigger`               | perturb when the gradient is long against its running mean          | 1 + fired share |

What goes together. `start` goes with everything, and so do all cases, `adaptive` and both kinds of `sync`:

|                      | `interval` >= 2          | `ascent_fraction` < 1                   | `trigger`         |
|----------------------|--------------------------|-----------------------------------------|-------------------|
| `interval` >= 2      |                          | yes: 1 + f/k                            | no: both say when |
| `reuse="stale"`      | needed                   | yes: 1 + f/k                            | no: both say when |
| `reuse="previous"`   | no: every step is a link | no: there is no first pass              | no: both say when |
| `reuse="echo"`       | needed                   | no: the first pass is a step's only one | no: both say when |
| `reuse="look"`       | needed                   | no: compares two gradients of one batch | no: both say when |
| `trigger`            | no: both say when        | no: its first pass may be the only one  |                   |

`ascent_depth` < 1 goes with `interval` alone: the others make `eps` of other passes than of the whole batch at hand,
whose forward through the layers before is what the second pass shares.

Under FSDP2: `interval`, `start`, `ascent_fraction`, `ascent_depth` (in two whole passes) and `reuse="stale"`. The
others read gradients that exist there only averaged over processes and in shards.
"""

from __future__ import annotations

from dataclasses import dataclass

from .knobs import Knobs, ceil_of_product
from .radius import COST
from .registry import SCHEDULES, TRIGGER
from .rule import Action, StepRule


@dataclass(frozen=True)
class PerturbationSchedule(Knobs):
    """Holds the knobs of the tables above, checked together.

    Args:
        interval: Perturb every so many steps, an integer >= 1. With `reuse`, renew what is reused every so many steps.
        start: Fraction of training without perturbation, 0 to 1: 0 perturbs from the first step, 1 never.
        ascent_fraction: Share of a micro-batch's samples, in (0, 1], that the first pass sees; two at least.
        ascent_depth: Share of the operations of a forward pass, in (0, 1], counted from the loss: the layers that do
            them are perturbed, the layers before run once for both passes. See [`find_late_layers`]. Where all
            micro-batches of a step share one `eps` (`sync="global"`), their graphs are kept until the last of them.
        reuse: What the steps between take from earlier ones; a key of `SCHEDULES`.
        trigger: Whether to decide by the gradient norm, see [`NormTrigger`].
        match_radius: Whether to adapt the radius to that of the full step, see [`RadiusMatch`]; for
            `ascent_fraction` or `ascent_depth` below 1 without `reuse`.
        look_alpha: Length of what `reuse="look"` adds, relative to the gradient, >= 0.

    Raises:
        ValueError: If a knob is out of range or two contradict each other. The message starts with a knob's name.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reuse not in SCHEDULES:
            raise ValueError(f"reuse={self.reuse!r}; expected one of {list(SCHEDULES)}.")
        self.rule.check(self)
        if self.ascent_depth < 1 and (self.trigger or self.reuse is not None or self.ascent_fraction < 1):
            raise ValueError(
                f"ascent_depth={self.ascent_depth} with ascent_fraction={self.ascent_fraction}, reuse={self.reuse!r}, "
                f"trigger={self.trigger}: layers before the perturbed ones run once where both passes are of one "
                "whole batch. Leave those out, or ascent_depth."
            )
        if self.match_radius and not self.rule.can_match_radius(self):
            raise ValueError(
                f"match_radius=True with ascent_fraction={self.ascent_fraction}, ascent_depth={self.ascent_depth}, "
                f"reuse={self.reuse!r}, trigger={self.trigger}: the radius is matched where each step has a "
                "perturbation made of a part of its own batch, or of the model. Set ascent_fraction or ascent_depth "
                "below 1 without reuse, or leave match_radius out."
            )

    @property
    def rule(self) -> type[StepRule]:
        """Return the class that runs the steps of this schedule."""
        return TRIGGER if self.trigger else SCHEDULES[self.reuse]

    @property
    def cost(self) -> float:
        """Return the mean number of forward+backward passes per step over a training; with `trigger`, the largest."""
        first_passes = self.rule.first_passes(self)
        matching = COST / self.interval if self.match_radius else 0.0
        return 1 + (1 - self.start) * (first_passes + matching) if first_passes else 1.0

    @property
    def has_state(self) -> bool:
        """Tell whether a step depends on earlier ones by more than the weights."""
        return self.rule.has_state or self.match_radius

    @property
    def perturbs_statistics(self) -> bool:
        """Whether running statistics of normalization come from passes at perturbed weights."""
        return self.rule.perturbs_statistics(self)

    @property
    def kind(self) -> str:
        """Name the knob that decides how stored state must be read."""
        return "trigger" if self.trigger else f"reuse={self.reuse!r}"

    def action(self, step: int, total_steps: int) -> Action:
        """Decide what optimizer step `step` (0-based) of `total_steps` does.

        `"plain"` is one pass without perturbation, `"two passes"` a perturbed step in full. `"reuse"` is one pass with
        what earlier steps left; `"watch"` is a plain pass after which the trigger decides on a second one.
        """
        first = ceil_of_product(self.start, total_steps)
        return "plain" if step < first else self.rule.action(self, step - first)

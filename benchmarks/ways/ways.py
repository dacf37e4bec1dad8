"""The ways to train that are compared: each with what it builds on and the settings that it may choose from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_saq.sharpness.schedules import StepRule

from ..shared.schedule_variants import ECHOED, QAT
from .rules import AgainstMomentum, CleanScales, OwnConfig, ShapedEcho, ShapedTwoPasses
from .shapes import Shape, loss_budget, noisy, per_layer, unchanged

FULL, LONGER, BALANCED, MATCHED, ECHO = (
    "full",
    "qat, twice the steps",
    "balanced",
    "balanced, radius matched",
    "echo 2",
)
MOMENTUM = "momentum (MSAM)"
SHORTER, PERTURBED_SCALES = "balanced, shorter", "full, choices of clean scales"
PART = {"ascent_fraction": 0.125}
TWICE = {"reuse": "echo", "interval": 2}


@dataclass(frozen=True)
class Setting:
    """What a way may choose besides its learning rate.

    Attributes:
        factor: Of the radius; see [`Way`].
        own: Numbers of its own.
    """

    factor: float = 0.0
    own: dict[str, float] = field(default_factory=dict)


def radii(*factors: float) -> tuple[Setting, ...]:
    return tuple(Setting(factor) for factor in factors)


def numbers(name: str, *values: float, factor: float = 1.0) -> tuple[Setting, ...]:
    return tuple(Setting(factor, {name: value}) for value in values)


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        builds_on: The way that shares all but what is new here: what it must beat.
        why: What it does, for the page.
        saq: Fields of `SAQConfig` besides `rho`; `None`: plain training.
        settings: To choose from; the learning rate is chosen with the first. Without any: learning rates alone.
        radius_of: Way whose chosen radius `Setting.factor` multiplies; `None`: the radius of the task.
        rule: Runs its steps in place of the package's.
        shape: Changes each `eps`.
        length: Steps, relative to those of plain training.
        extra: What follows the optimizer's steps: `"average"` or `"freeze"`.
        is_new: Whether the package lacks it.
        rival: Way of the package at the same price, which it must not fall behind on average.
        control: Way that shares its choices and lacks what is new, to say where a difference comes from.
        choice_of: Of a control: the way whose choices it takes, without trials of its own.
    """

    builds_on: str
    why: str
    saq: dict[str, Any] | None = field(default_factory=dict)
    settings: tuple[Setting, ...] = radii(1, 0.5, 2)
    radius_of: str | None = None
    rule: type[StepRule] | None = None
    shape: Shape = unchanged
    length: int = 1
    extra: str | None = None
    is_new: bool = True
    rival: str | None = None
    control: str | None = None
    choice_of: str | None = None

    def config(self, rho: float, own: dict[str, float]) -> OwnConfig:
        """Build the configuration of a training."""
        fields: dict[str, Any] = {"case": None} if self.saq is None else self.saq or {"schedule": "full"}
        return OwnConfig(rho=rho, own_rule=self.rule, shape=self.shape, own=own, **fields)


DECAYS = numbers("decay", 0.95, 0.9, 0.98)
THRESHOLDS = numbers("threshold", 0.05, 0.1, 0.02)
BUDGETS = numbers("sigma", 0.1, 0.03, 0.3, factor=2)
NOISES = (*numbers("noise", 1, 2), *numbers("noise", 1, factor=2))

WAYS: dict[str, Way] = {
    QAT: Way(QAT, "plain training", saq=None, settings=(), is_new=False),
    LONGER: Way(QAT, "plain training, twice as long", saq=None, settings=(), length=2, is_new=False),
    FULL: Way(QAT, "two passes in each step", is_new=False),
    BALANCED: Way(QAT, "`eps` from an eighth of the batch", PART, is_new=False),
    MATCHED: Way(
        BALANCED, "`balanced` with its radius matched to `full`'s", {**PART, "match_radius": True}, is_new=False
    ),
    ECHOED: Way(QAT, "plain training on each batch twice in a row", TWICE, settings=(), is_new=False),
    ECHO: Way(ECHOED, "each batch twice in a row, the second time at its own `eps`", TWICE, is_new=False),
    "echo 3": Way(ECHO, "each batch three times, `eps` renewed at each visit", {**TWICE, "interval": 3}, is_new=False),
    MOMENTUM: Way(
        QAT,
        "`eps` against the momentum",
        settings=radii(5, 1.5, 15),
        rule=AgainstMomentum,
        rival=ECHO,
    ),
    "balanced + noise": Way(
        BALANCED,
        "noise added to the `eps` of an eighth",
        PART,
        settings=NOISES,
        radius_of=BALANCED,
        rule=ShapedTwoPasses,
        shape=noisy,
        control=SHORTER,
    ),
    SHORTER: Way(
        BALANCED,
        "control: the `eps` of an eighth, as long as the noisy one is along the gradient",
        PART,
        choice_of="balanced + noise",
        is_new=False,
    ),
}
"""In the order of the tables, which is that of choosing: a way comes after the one whose radius it takes."""

for base, knobs, rule in ((FULL, {}, ShapedTwoPasses), (ECHO, TWICE, ShapedEcho)):
    how: dict[str, Any] = {"saq": knobs, "radius_of": base, "rule": rule}
    WAYS[f"{base} + loss budget"] = Way(
        base, "radius `min(sigma / |g|, rho)` (LE-SAM)", settings=BUDGETS, shape=loss_budget, **how
    )
    WAYS[f"{base} + radius per layer"] = Way(
        base, "radius of a tensor in proportion to its length", settings=radii(1, 0.5, 2), shape=per_layer, **how
    )

WAYS[f"{FULL} + clean scales"] = Way(
    FULL,
    "scales updated by the clean pass",
    settings=radii(1, 0.5, 2),
    radius_of=FULL,
    rule=CleanScales,
    control=PERTURBED_SCALES,
)
WAYS[PERTURBED_SCALES] = Way(
    FULL, "control: `full` at the choices of clean scales", choice_of=f"{FULL} + clean scales", is_new=False
)
for base, saq in ((QAT, None), (FULL, {}), (ECHO, TWICE)):
    source: dict[str, Any] = {"saq": saq, "radius_of": base if saq is not None else None}
    WAYS[f"{base} + average"] = Way(
        base, "moving average of latent weights, evaluated at low bits", settings=DECAYS, extra="average", **source
    )
for base, saq in ((QAT, None), (ECHO, TWICE)):
    source = {"saq": saq, "radius_of": base if saq is not None else None}
    WAYS[f"{base} + freezing"] = Way(
        base, "oscillating weights frozen towards the end", settings=THRESHOLDS, extra="freeze", **source
    )

"""The ways to train that the accuracy benchmark compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..shared.schedule_variants import saq_config

QAT, LONGER, SAQ, ADAPTIVE, BALANCED = "qat", "qat, twice the steps", "case 3", "adaptive case 3", "balanced"
ECHO, MATCHED, INTERVAL = "echo", "balanced, radius matched", "interval 5"
LATE, SIXTH, HEAD, QUARTER = "last eighth", "last sixth", "head", "last quarter, every 2nd step"
CASES = ("case 1", "case 2")
DISTILL_ALPHA = 0.5
CLEAN_BATCHES = 15


@dataclass(frozen=True)
class Method:
    """One way to train a quantized model.

    Attributes:
        saq: Fields of `SAQConfig` besides `rho`; `None`: plain quantization-aware training.
        radius_of: Method whose radius it uses; itself, if it has one of its own.
        rate_of: Method whose learning rate it uses where methods have one of their own; `None`: its own.
        radii: Its radius on tasks where that is known without trials of the task, by the task's name.
        length: Steps, relative to those of plain training.
        distill_alpha: Weight of the float model's logits in the loss.
        echoed: Whether every batch is trained on in two steps in a row.
        clean_batches: Training batches that batch-norm statistics are estimated anew from when training is over.
    """

    saq: dict[str, Any] | None = field(default_factory=dict)
    radius_of: str = SAQ
    rate_of: str | None = None
    radii: dict[str, float] = field(default_factory=dict)
    length: int = 1
    distill_alpha: float = 0.0
    echoed: bool = False
    clean_batches: int = 0

    @property
    def control(self) -> dict[str, Any]:
        """What not all methods have, for the arguments of a run."""
        return {name: getattr(self, name) for name in ("echoed", "clean_batches") if getattr(self, name)}

    @property
    def passes(self) -> float:
        """Forward and backward passes over those of plain training."""
        return self.length * (1 if self.saq is None else saq_config(0.0, self.saq).perturbation_schedule().cost)


METHODS: dict[str, Method] = {
    QAT: Method(saq=None),
    LONGER: Method(saq=None, length=2),
    SAQ: Method(),
    "case 2": Method({"case": 2}, radius_of="case 2", rate_of=SAQ),
    "case 1": Method({"case": 1}, radius_of="case 1", rate_of=SAQ),
    ADAPTIVE: Method({"adaptive": True}, radius_of=ADAPTIVE),
    BALANCED: Method({"interval": 1, "ascent_fraction": 0.125, "reuse": None, "trigger": False}),
    "qat, distilled": Method(saq=None, distill_alpha=DISTILL_ALPHA),
    "case 3, distilled": Method(distill_alpha=DISTILL_ALPHA),
    ECHO: Method({"reuse": "echo", "interval": 2}, radius_of=ECHO),
    MATCHED: Method({"ascent_fraction": 0.125, "match_radius": True}, radius_of=MATCHED, clean_batches=CLEAN_BATCHES),
    INTERVAL: Method({"interval": 5}),
    LATE: Method({"ascent_depth": 0.125}, radius_of=LATE, rate_of=SAQ),
    SIXTH: Method({"ascent_depth": 1 / 6}, radius_of=SIXTH, rate_of=SAQ),
    QUARTER: Method(
        {"ascent_depth": 0.25, "interval": 2},
        rate_of=SAQ,
        radii={"flowers": 0.3, "flowers-vit-pooled": 0.1, "flowers-efficientnet": 0.3},  # docs/cheaper.md
    ),
    HEAD: Method({"ascent_depth": 0.02}, radius_of=LATE, rate_of=SAQ),
    "qat, echoed batches": Method(saq=None, echoed=True),
    "qat, clean statistics": Method(saq=None, clean_batches=CLEAN_BATCHES),
}
"""`case 2` is SAM as it stands, on a quantized model; `balanced` is the preset, in the words of the runs that are
stored. In the order of the tables.

The last two are controls: they share with cheap schedules all but the perturbation (docs/protocol.md)."""

DEFAULT = [QAT, SAQ, LONGER, "case 2", "case 1", ADAPTIVE, BALANCED]
"""Those of a sweep unless others are asked for: what carries a claim first."""

"""The ways that are searched among, and the radius that each has on each task. Written before their runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...shared.schedule_variants import saq_config
from ..methods import CLEAN_BATCHES, METHODS, QAT, SAQ

MOBILENET, VIT = "flowers", "flowers-vit-pooled"
TASKS = (MOBILENET, VIT)
"""In the order in which they are asked."""
RATES = {MOBILENET: (1e-3, 1e-3), VIT: (2e-4, 3e-4)}
"""Learning rates that plain QAT and case 3 chose on each task, by its name: of plain and of perturbed ways here."""
REFERENCES = (QAT, SAQ)
SEEDS = (100, 101)
"""Those that choose, none of which is a seed of reported runs."""


@dataclass(frozen=True)
class Way:
    """A way to perturb.

    Attributes:
        saq: Fields of `SAQConfig` besides `rho`; `None`: plain quantization-aware training.
        radii: Radius on each of `TASKS`, by its name.
        why: What speaks for it, in words for the page.
    """

    saq: dict[str, Any] | None
    radii: dict[str, float]
    why: str

    @property
    def passes(self) -> float:
        """Forward and backward passes over those of plain training."""
        return 1.0 if self.saq is None else saq_config(0.0, self.saq).perturbation_schedule().cost

    @property
    def clean_batches(self) -> int:
        """Training batches that batch-norm statistics are estimated anew from, where passes see only a part."""
        return CLEAN_BATCHES if self.saq and ("ascent_fraction" in self.saq or "reuse" in self.saq) else 0


def _at(mobilenet: float, vit: float) -> dict[str, float]:
    return {MOBILENET: mobilenet, VIT: vit}


WAYS: dict[str, Way] = {
    QAT: Way(METHODS[QAT].saq, {}, "what gains are over"),
    SAQ: Way(METHODS[SAQ].saq, _at(0.1, 0.1), "what is to be kept, at the radius of its trials"),
    "an eighth of the batch": Way(
        {"ascent_fraction": 0.125}, _at(0.3, 0.2), "`balanced` at a longer radius, as its `eps` raises the loss less"
    ),
    "an eighth of the batch, radius matched": Way(
        {"ascent_fraction": 0.125, "match_radius": True},
        _at(0.1, 0.1),
        "its radius is made as long as the rise of the loss asks for",
    ),
    "a quarter of the batch, every 2nd step": Way(
        {"ascent_fraction": 0.25, "interval": 2}, _at(0.3, 0.1), "a better direction, half as often"
    ),
    "every 8th step": Way({"interval": 8}, _at(0.3, 0.1), "the very direction, an eighth as often"),
    "LookSAM, every 8th step": Way(
        {"reuse": "look", "interval": 8}, _at(0.1, 0.1), "the part of the second gradient across the first is reused"
    ),
    "LookSAM, every 8th step, longer": Way(
        {"reuse": "look", "interval": 8}, _at(0.3, 0.2), "the same at a longer radius"
    ),
    "the last eighth of training": Way(
        {"start": 0.875}, _at(0.3, 0.1), "SAM late in training is said to find flat minima too (arXiv:2410.10373)"
    ),
    "every 2nd step of the last quarter": Way({"start": 0.75, "interval": 2}, _at(0.3, 0.1), "the same, longer"),
    "last half of the layers, every 4th step": Way(
        {"ascent_depth": 0.5, "interval": 4}, _at(0.3, 0.1), "most of the rise of the loss at half the price"
    ),
    "last quarter of the layers, every 2nd step": Way(
        {"ascent_depth": 0.25, "interval": 2}, _at(0.3, 0.1), "more layers than `last_layers`, half as often"
    ),
    "last eighth of the layers": Way({"ascent_depth": 0.125}, _at(0.3, 0.1), "`last_layers`, the best so far"),
    "norms and biases, an eighth of the batch": Way(
        {"perturb": ["bias", "norm"], "ascent_fraction": 0.125},
        _at(0.3, 0.2),
        "SAM of norms alone is said to gain more (arXiv:2306.04226)",
    ),
    "the step before": Way({"reuse": "previous"}, _at(0.03, 0.03), "one pass in all"),
    "head": Way({"ascent_depth": 0.02}, _at(1.0, 0.3), "hardly more than one pass, at a longer radius"),
}

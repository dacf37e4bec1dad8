"""Make `eps` of the gradient from the only pass of the step before: no step has a second pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...displacement import Displacement
from ..knobs import Knobs
from ..rule import MicroBatch, Outcome, StepRule


class Previous(StepRule):
    """Displaces each pass by the `eps` of the step before, and records the gradients for the next `eps`."""

    def forget(self) -> None:
        self.eps = Displacement()

    @classmethod
    def check(cls, knobs: Knobs) -> None:
        if knobs.interval > 1 or knobs.ascent_fraction < 1:
            raise ValueError(
                f"reuse='previous' with interval={knobs.interval}, ascent_fraction={knobs.ascent_fraction}: every "
                "step makes the eps of the next one from its only pass. Leave interval and ascent_fraction out."
            )

    @classmethod
    def perturbs_statistics(cls, knobs: Knobs) -> bool:  # noqa: ARG003
        return True

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        with self.minimizer.displaced(self.eps), self.minimizer.recorded():
            outcome = Outcome(micro.backward(micro.batch), is_clean=not self.eps)
        if micro.is_last:
            self.eps = self.minimizer.climb()
            outcome.ascent_norm = self.norm_per_sample()
        return outcome

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.eps.named(self.minimizer.model), {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.eps = Displacement.from_named(tensors, self.minimizer.model)

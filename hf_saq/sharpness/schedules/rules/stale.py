"""Renew `eps` every `interval` steps in two passes; the steps between are one pass at `Q(w)` plus the last `eps`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...displacement import Displacement
from ..knobs import Knobs
from ..rule import Action, MicroBatch, Outcome
from .two_passes import TwoPasses


def check_renewal(reuse: str, knobs: Knobs) -> None:
    """Raise `ValueError` if every step would renew what is kept for the steps between."""
    if knobs.interval < 2:
        raise ValueError(
            f"reuse={reuse!r} with interval=1 would renew at every step what it keeps, at full cost. Set interval to "
            "2 or more."
        )


class Stale(TwoPasses):
    """Keeps the `eps` of the last two-pass step, made from all its micro-batches, and adds it in the other steps."""

    has_state = True

    def forget(self) -> None:
        super().forget()
        self.eps = Displacement()

    @classmethod
    def check(cls, knobs: Knobs) -> None:
        check_renewal("stale", knobs)

    @classmethod
    def action(cls, knobs: Knobs, step: int) -> Action:
        return "reuse" if step % knobs.interval else "two passes"

    @property
    def one_eps_for_a_step(self) -> bool:
        return True

    @classmethod
    def perturbs_statistics(cls, knobs: Knobs) -> bool:  # noqa: ARG003
        return True

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        if micro.action == "two passes":
            outcome, self.eps = self.two_passes(micro)
            return outcome
        with self.minimizer.displaced(self.eps):
            return Outcome(micro.backward(micro.batch), is_clean=not self.eps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.eps.named(self.minimizer.model), {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.eps = Displacement.from_named(tensors, self.minimizer.model)

"""Use each batch in several steps in a row: its gradient in one step makes the `eps` of the next. One pass a step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...displacement import Displacement
from ...frozen_batch_norm import frozen_norm_statistics
from ..knobs import Knobs
from ..rule import Action, MicroBatch, Outcome, StepRule

EPS, BATCHES, VISITS = "eps.", "batches", "visits"
"""Names in the stored state: what stands before the name of a tensor of `eps`, what holds the kept batches, and how
often they were visited."""


class Echo(StepRule):
    """Visits the same micro-batches in `interval` optimizer steps in a row.

    The first visit is a plain step whose gradient is recorded. Each later one is a single pass displaced by the `eps`
    that the visit before recorded: the gradient of the same images, one optimizer step old. Gradients of other images
    point elsewhere, which is why `eps` of another batch (`reuse="previous"`) or of a part of it keeps less of the gain
    (docs/schedules.md). The last visit records nothing, and the batches are let go.

    Running statistics of normalization come from first visits: later ones see the same images, displaced.
    """

    def forget(self) -> None:
        self.eps = Displacement()
        self.kept: list[Any] = []
        self.visits = 0

    @classmethod
    def check(cls, knobs: Knobs) -> None:
        if knobs.interval < 2:
            raise ValueError(
                "reuse='echo' with interval=1 would never come back to a batch. Set interval to the number of steps "
                "in a row that use it, 2 or more."
            )
        if knobs.ascent_fraction < 1:
            raise ValueError(
                f"reuse='echo' with ascent_fraction={knobs.ascent_fraction}: the gradient that makes eps is also that "
                "of a whole step. Leave ascent_fraction out."
            )

    @classmethod
    def action(cls, knobs: Knobs, step: int) -> Action:
        return "reuse" if step % knobs.interval else "record"

    def batches_of(self, drawn: Sequence[Any], action: Action) -> Sequence[Any]:
        # The last step of an epoch may have fewer micro-batches: it begins anew with its own.
        return self.kept if action == "reuse" and len(self.kept) == len(drawn) else drawn

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        batches = self.batches_of(micro.batches, micro.action)
        again = batches is self.kept
        is_last_visit = again and self.visits + 1 >= self.knobs.interval
        eps = self.eps if again else Displacement()
        with frozen_norm_statistics(self.minimizer.model) if again else nullcontext():
            with self.minimizer.displaced(eps), nullcontext() if is_last_visit else self.minimizer.recorded():
                outcome = Outcome(micro.backward(batches[micro.k]), is_clean=not eps)
        if micro.is_last and is_last_visit:
            self.forget()
        elif micro.is_last:
            self.eps, self.kept, self.visits = self.minimizer.climb(), list(batches), self.visits + 1 if again else 1
            outcome.ascent_norm = self.norm_per_sample()
        return outcome

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{EPS}{name}": tensor for name, tensor in self.eps.named(self.minimizer.model).items()}
        return tensors | ({BATCHES: _as_bytes(self.kept)} if self.kept else {}), {VISITS: self.visits}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        eps = {name.removeprefix(EPS): tensor for name, tensor in tensors.items() if name.startswith(EPS)}
        self.eps = Displacement.from_named(eps, self.minimizer.model)
        device = next(self.minimizer.model.parameters()).device
        self.kept = _from_bytes(tensors[BATCHES], device) if BATCHES in tensors else []
        # Checkpoints of older versions do not have the number; they kept batches of a last visit too, for nothing.
        self.visits = values.get(VISITS, min(1, len(self.kept)))


def _as_bytes(batches: list[Any]) -> Tensor:
    """Write batches of any structure of tensors and plain values into one tensor of bytes, uint8."""
    buffer = io.BytesIO()
    torch.save([_plain(batch) for batch in batches], buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(stored: Tensor, device: torch.device) -> list[Any]:
    """Read what [`_as_bytes`] wrote; runs no code that the file brings along.

    Raises:
        ValueError: If a value is neither a tensor nor plain.
    """
    try:
        return torch.load(io.BytesIO(stored.numpy().tobytes()), map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(
            "The batch that reuse='echo' would visit again cannot be read from the checkpoint: its values are not "
            f"only tensors, numbers and strings ({error}). Let the collator give such values alone."
        ) from error


def _plain(value: Any) -> Any:
    """Turn mappings such as `BatchEncoding` into dictionaries."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner) for inner in value)
    return value

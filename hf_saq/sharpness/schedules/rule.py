"""Define what all schedules have in common: a rule for the passes of an optimizer step, with state between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ..minimizer import SharpnessAwareMinimizer
from .knobs import Knobs

Action = Literal["plain", "two passes", "reuse", "watch", "record"]


class Backward(Protocol):
    """Runs forward and backward of one micro-batch and returns the loss, divided by the number of micro-batches.

    With `reduce=False` gradients must not be communicated: forward and backward, both, belong inside of
    `ddp.no_sync()` or `accelerator.no_sync(model)`. DDP decides in the forward whether the backward communicates.
    """

    def __call__(self, batch: Any, reduce: bool = True) -> Tensor: ...


@dataclass
class Outcome:
    """Holds what one micro-batch gave, for the log.

    Attributes:
        loss: Loss of the whole micro-batch, at the quantized weights where `is_clean`, else at the perturbed ones.
            Where the second passes of several micro-batches follow the last first pass, their losses are added up
            there.
        sharpness: Perturbed minus clean loss, for each micro-batch that has both of the same samples.
        ascent_norm: Norm of the gradient that a new `eps` was made of here, per sample and without loss scale; `None`
            if no new `eps` was made.
        radius_factor: What `rho` is multiplied by, of the last micro-batch of a step whose schedule adapts it.
        is_clean: Whether `loss` is that of the model itself.
    """

    loss: Tensor
    sharpness: list[Tensor] = field(default_factory=list)
    ascent_norm: float | None = None
    radius_factor: float | None = None
    is_clean: bool = True


@dataclass(frozen=True)
class MicroBatch:
    """Holds one micro-batch of an optimizer step.

    Attributes:
        k: Its number in the step, from 0.
        batches: All micro-batches of the step.
        backward: Runs forward and backward of one of them.
        action: What this step does.
        progress: Fraction of training that is over, 0 to 1.
    """

    k: int
    batches: Sequence[Any]
    backward: Backward
    action: Action
    progress: float

    @property
    def batch(self) -> Any:
        """Return the batch number `k`."""
        return self.batches[self.k]

    @property
    def is_last(self) -> bool:
        """Tell whether this is the last micro-batch of the step."""
        return self.k == len(self.batches) - 1


class StepRule(ABC):
    """Runs the passes of an optimizer step under one schedule.

    A new schedule is a file in `rules/` and a line in `registry.py`. Class attributes say what a rule needs, so that
    contradictions are refused before training starts. Subclasses implement [`micro_batch`]; those that remember
    something between steps also [`state`] and [`load_state`].

    Args:
        minimizer: Its contexts are the parts that a step is made of.
        knobs: The knobs of the schedule.
        loss_scale: Returns the factor that losses are multiplied by at the moment (fp16).
        sample_names: Keys of a batch whose values have one entry a sample; `None` goes by their lengths alone.

    Attributes:
        share: Share of the samples of the step that the backward under way sees; below 1 in a first pass on parts.
    """

    has_state: ClassVar[bool] = True
    """Whether a step depends on earlier ones by more than the weights."""
    needs_whole_gradients: ClassVar[bool] = True
    """Whether it reads gradients of parameters as one process computes them, which FSDP2 does not have."""

    def __init__(
        self,
        minimizer: SharpnessAwareMinimizer,
        knobs: Knobs,
        loss_scale: Callable[[], float] = lambda: 1.0,
        sample_names: Collection[str] | None = None,
    ):
        self.minimizer, self.knobs, self.loss_scale, self.sample_names = minimizer, knobs, loss_scale, sample_names
        self.share = 1.0
        self.forget()

    @classmethod  # noqa: B027 (most rules have nothing to check)
    def check(cls, knobs: Knobs) -> None:
        """Raise `ValueError` if a knob contradicts this rule. The message starts with a knob's name."""

    @classmethod
    def action(cls, knobs: Knobs, step: int) -> Action:  # noqa: ARG003
        """Decide what the step number `step` does, counted from 0 at the first step that may be perturbed."""
        return "reuse"

    @classmethod
    def first_passes(cls, knobs: Knobs) -> float:  # noqa: ARG003
        """Return the first passes of a step on average, in passes over whole batches: its cost beyond a plain step."""
        return 0.0

    @classmethod
    def can_match_radius(cls, knobs: Knobs) -> bool:  # noqa: ARG003
        """Tell whether each step has an `eps` of a part of its batch, or of the model, to match the radius of."""
        return False

    @classmethod
    def perturbs_statistics(cls, knobs: Knobs) -> bool:  # noqa: ARG003
        """Tell whether running statistics of normalization come from passes at perturbed weights."""
        return False

    def forget(self) -> None:  # noqa: B027
        """Forget what earlier steps left. The constructor calls it too, so it makes the first state."""

    def batches_of(self, drawn: Sequence[Any], action: Action) -> Sequence[Any]:  # noqa: ARG002
        """Return the micro-batches that a step uses: those `drawn` for it, unless it comes back to earlier ones."""
        return drawn

    def begin_step(self) -> None:  # noqa: B027
        """Forget what belongs to the step before, which may have been stopped half-way."""

    @abstractmethod
    def micro_batch(self, micro: MicroBatch) -> Outcome:
        """Leave the gradients of this micro-batch in `p.grad`, for every action but `"plain"`."""

    def norm_per_sample(self, factor: float = 1.0) -> float:
        """Compute the norm of the gradient that the last `eps` was made of, times `factor`, without loss scale."""
        return self.minimizer.ascent_norm * factor / self.loss_scale()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the next step needs of the earlier ones, on this process: named tensors, JSON-plain values."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: B027
        """Load what [`state`] returned. Raise `ValueError` if the tensors are not those of this model."""

"""Log how many weights oscillate between two codes: a callback for `SAQTrainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..analysis import OscillationCounter


class OscillationCallback(TrainerCallback):
    """Adds the share of oscillating weights (Nagel et al., arXiv:2203.11086) to the training logs of `SAQTrainer`.

    `oscillating_weights` and `changed_codes` then stand beside the loss, in `log_history` and wherever logs go; see
    [`OscillationCounter`]. A run that is resumed counts from there. Each step takes one pass more over the weights.

    Args:
        momentum: Weight of one step in the running frequency, in (0, 1].
        threshold: Frequency above which a weight counts as oscillating.
    """

    def __init__(self, momentum: float = 0.01, threshold: float = 0.005):
        self.momentum, self.threshold = momentum, threshold
        self.counter: OscillationCounter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the codes that training starts from."""
        self.counter = OscillationCounter(kwargs["model"], self.momentum, self.threshold)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at the codes after an optimizer step."""
        if self.counter is not None:
            self.counter.update()

    def to_log(self) -> dict[str, float]:
        """Return what `SAQTrainer` adds to a line of its training log."""
        return {} if self.counter is None else self.counter.summary()

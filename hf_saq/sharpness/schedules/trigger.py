"""Perturb where the gradient is long: AE-SAM, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
arXiv:2304.14647."""

from __future__ import annotations

import math

DECAY = 0.9
"""The paper's `delta`."""

FIRST_THRESHOLD, LAST_THRESHOLD = 1.0, -1.0
"""The paper's `lambda_2` and `lambda_1`: `c_t` at the beginning and at the end of training."""


class NormTrigger:
    """Fires if `||g||^2 >= mean + c_t * std`, with running `mean` and `std` of `||g||^2` that include this one.

    `c_t` goes linearly from 1 to -1, so that perturbations are rare at first and usual at the end. The mean starts at
    the first norm.

    Attributes:
        mean (`float | None`): Running mean; `None` before the first norm.
        variance (`float`): Running variance.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.variance = 0.0

    def fires(self, squared_norm: float, progress: float) -> bool:
        """Take `squared_norm` into the statistics and decide.

        Args:
            squared_norm: Of the gradient, without any loss scale. One that is not finite does not count and never
                fires.
            progress: Fraction of training that is over.
        """
        if not math.isfinite(squared_norm):
            return False
        self.mean = squared_norm if self.mean is None else DECAY * self.mean + (1 - DECAY) * squared_norm
        self.variance = DECAY * self.variance + (1 - DECAY) * (squared_norm - self.mean) ** 2
        threshold = FIRST_THRESHOLD + (LAST_THRESHOLD - FIRST_THRESHOLD) * progress
        return squared_norm >= self.mean + threshold * math.sqrt(self.variance)

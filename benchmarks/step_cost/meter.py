"""Times of steps that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Interleaved medians on one clock."""

    def __init__(self, clock: str, repetitions: int, device: torch.device):
        self.now = time.process_time if clock == "process" else time.perf_counter
        self.repetitions, self.device = repetitions, device

    def medians(self, steps: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of one call of each."""
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # what happens once: allocation, compilation, first statistics
            step()
            step()
        for _ in range(self.repetitions):
            for name, step in steps.items():
                synchronize(self.device)
                start = self.now()
                step()
                synchronize(self.device)
                seconds[name].append(self.now() - start)
        return {name: statistics.median(values) for name, values in seconds.items()}

"""Replay a stream of samples: its first ones can be read before training begins, and come again in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


class ReplayedStream(IterableDataset):
    """Gives the samples that its first reader took to the second reader again, which then reads on from there.

    So a stream that can be read only once loses nothing. Later readers begin the stream anew, as they would without
    this class. Each worker process has a copy that nobody has read, so there is nothing to give again.

    Args:
        stream: Any iterable data set.
    """

    def __init__(self, stream: Any):
        super().__init__()
        self.stream = stream
        self._taken: list[Any] | None = None
        self._rest: Iterator[Any] | None = None
        self._readers = 0

    def __iter__(self) -> Iterator[Any]:
        self._readers += 1
        if self._readers == 1:
            return self._first_reading()
        if self._readers == 2:
            return self._second_reading()
        return iter(self.stream)

    def _first_reading(self) -> Iterator[Any]:
        self._taken, self._rest = [], iter(self.stream)
        for sample in self._rest:
            self._taken.append(sample)
            yield sample

    def _second_reading(self) -> Iterator[Any]:
        taken, rest = self._taken, self._rest
        self._taken = self._rest = None
        if taken is None or rest is None:  # the first reading was in another process
            yield from self.stream
            return
        while taken:
            yield taken.pop(0)
        yield from rest

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream which epoch begins, if it wants to know."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

"""Replay a stream of samples: its first ones can be read before training begins, and come again in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


class ReplayedStream(IterableDataset):
    """Gives every reader the samples from the first on, until [`read_for_good`]; the next reader takes them along.

    So a stream that can be read only once loses nothing. Later readers begin the stream anew, as they would without
    this class. Each worker process has a copy that nobody has read, so there is nothing to give again. What else is
    asked of it, the stream answers.

    Args:
        stream: Any iterable data set.
    """

    def __init__(self, stream: Any):
        super().__init__()
        self.stream = stream
        self._taken: list[Any] = []
        self._rest: Iterator[Any] | None = None
        self._keeps = True

    def read_for_good(self) -> None:
        """Let the next reader be the one that the samples are for, once all that read ahead have done so."""
        self._keeps = False

    def __iter__(self) -> Iterator[Any]:
        if self._keeps:
            return self._reading_ahead()
        taken, rest = self._taken, self._rest
        self._taken, self._rest = [], None
        return iter(self.stream) if rest is None else _continued(taken, rest)

    def _reading_ahead(self) -> Iterator[Any]:
        if self._rest is None:
            self._rest = iter(self.stream)
        position = 0
        while True:
            if position == len(self._taken):
                try:
                    self._taken.append(next(self._rest))
                except StopIteration:
                    return
            yield self._taken[position]
            position += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_taken": [], "_rest": None}  # for a worker process; iterators cannot go there

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "stream":  # a copy is asked for these before it has a stream
            raise AttributeError(name)
        return getattr(self.stream, name)


class SizedReplayedStream(ReplayedStream):
    """Is a [`ReplayedStream`] of a stream that knows its length."""

    def __len__(self) -> int:
        return len(self.stream)


def replayed(stream: Any) -> ReplayedStream:
    """Let what reads `stream` ahead of training take nothing from it."""
    return (SizedReplayedStream if hasattr(stream, "__len__") else ReplayedStream)(stream)


def _continued(taken: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    while taken:
        yield taken.pop(0)
    yield from rest

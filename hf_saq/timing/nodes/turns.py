"""Let graphs take turns under the profiler of an engine, so that what slows the machine down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .profilers import PROFILERS, Nanoseconds, Profiler, RunningNode

SECONDS = 0.1
"""How long a turn takes at least, unless that needs more than `MOST_CALLS`. A call before brings the graph back into
the caches and does not count."""
MOST_CALLS = 50


@dataclass(frozen=True)
class NodeTimes:
    """Holds what was found of one graph.

    Attributes:
        nodes: What ran, in its order.
        turns: For each turn the name of a node -> what a call of it took, in ns, the mean over the calls of the turn.
    """

    nodes: list[RunningNode]
    turns: list[Nanoseconds]


def time_nodes(
    contents: Mapping[str, bytes],
    images: np.ndarray,
    stage: Path,
    *,
    engine: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 10,
    tell: Callable[[], object] = lambda: None,
) -> dict[str, NodeTimes]:
    """Run graphs in turns on the CPU, for `rounds` rounds after one to warm up, and read what each node took.

    Args:
        contents: Graphs of one input, by names that files may have.
        images: That input, float32 `(batch, ...)`.
        stage: Existing directory for the files of the engine.
        engine: A key of `PROFILERS`.
        threads: Threads of each graph.
        tell: Is called after each round.

    Raises:
        RuntimeError: If a profile does not hold every call.
    """
    running = {name: PROFILERS[engine](content, stage / name, threads) for name, content in contents.items()}
    calls: dict[str, list[int]] = {name: [] for name in running}
    for _ in range(rounds + 1):
        for name, profiler in running.items():
            calls[name].append(_one_turn(profiler, images))
        tell()
    return {name: NodeTimes(p.nodes, _by_turn(p.finish(), calls[name])[1:]) for name, p in running.items()}


def _one_turn(profiler: Profiler, images: np.ndarray) -> int:
    profiler.run(images)
    end, calls = time.perf_counter() + SECONDS, 0
    while calls == 0 or (time.perf_counter() < end and calls < MOST_CALLS):
        profiler.run(images)
        calls += 1
    return calls + 1


def _by_turn(runs: list[Nanoseconds], calls: list[int]) -> list[Nanoseconds]:
    if len(runs) != sum(calls) or any(run.keys() != runs[0].keys() for run in runs):
        raise RuntimeError(f"the profile holds {len(runs)} calls of {sum(calls)}; measure fewer rounds.")
    left = iter(runs)
    found = []
    for count in calls:
        turn = list(islice(left, count))
        found.append({name: sum(run[name] for run in turn[1:]) / (count - 1) for name in turn[0]})
    return found

"""Learning rates and radii of the methods, chosen by accuracy on validation images.

Each choice is the best in mean accuracy, the smaller of equals. Two ways, by what the task says:

- `each_by_itself` (tasks with `plain_learning_rates`; docs/protocol.md): every method has a learning rate and a radius
  of its own, and as many trials as any other.
- `at_the_rate_of_qat` (tasks whose runs are older than that): plain QAT chooses the learning rate of all; radii are
  chosen at that rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from .methods import METHODS, QAT
from .task import Task

GIVE_UP = 0.05
"""Values that are this much worse in accuracy than the best are hopeless: `at_the_rate_of_qat` tries no larger ones,
and methods that follow another in its learning rate do not try its hopeless radii."""


class Chosen(NamedTuple):
    """What a method trains with.

    Attributes:
        rho: `None` for methods that do not perturb.
    """

    lr: float
    rho: float | None


Accuracy = Callable[[str, Chosen], float]
"""Mean validation accuracy of the trials of a method at some learning rate and radius."""


def choose(task: Task, methods: Sequence[str], accuracy: Accuracy) -> dict[str, Chosen]:
    """What each of `methods` trains with."""
    return (each_by_itself if task.trials else at_the_rate_of_qat)(task, methods, accuracy)


def each_by_itself(task: Task, methods: Sequence[str], accuracy: Accuracy) -> dict[str, Chosen]:
    """Methods that perturb try all learning rates at the middle radius, then the other radii at the best of them;
    the others try as many learning rates. Nothing is left out, however bad: `task.trials` trials for each.

    Those with the learning rate of another method (`Method.rate_of`) try at that rate the radii that were not hopeless
    for that method (`GIVE_UP`).
    """
    tried: dict[str, dict[Chosen, float]] = {}

    def search(method: str) -> Chosen:
        if task.trials == 1:  # there is nothing to choose
            if METHODS[method].saq is None:
                return Chosen(task.plain_learning_rates[0], None)
            return Chosen(task.learning_rates[0], task.radii_of(method)[0])

        def scores(candidates: Sequence[Chosen]) -> dict[Chosen, float]:
            with ThreadPoolExecutor(len(candidates)) as threads:  # they only wait for the pool of processes
                return dict(zip(candidates, threads.map(lambda c: accuracy(method, c), candidates), strict=True))

        if METHODS[method].saq is None:
            return _best(scores([Chosen(lr, None) for lr in task.plain_learning_rates]))
        radii = task.radii_of(method)
        if (leader := METHODS[method].rate_of) is not None:
            best = max(tried[leader].values())
            hopeless = {settings.rho for settings, score in tried[leader].items() if score < best - GIVE_UP}
            return _best(scores([Chosen(rates[leader], rho) for rho in radii if rho not in hopeless]))
        middle = radii[(len(radii) - 1) // 2]
        found = scores([Chosen(lr, middle) for lr in task.learning_rates])
        lr = _best(found).lr
        at_best = {c: score for c, score in found.items() if c.lr == lr}
        tried[method] = {**at_best, **scores([Chosen(lr, rho) for rho in radii if rho != middle])}
        return _best({**found, **tried[method]})

    rates: dict[str, float] = {}
    followers = [method for method in methods if METHODS[method].rate_of is not None]
    leaders = {str(METHODS[method].rate_of) for method in followers} | (set(methods) - set(followers))
    found: dict[str, Chosen] = {}
    for together in (sorted(leaders), followers):
        with ThreadPoolExecutor(max(1, len(together))) as threads:
            found |= zip(together, threads.map(search, together), strict=True)
        rates |= {method: settings.lr for method, settings in found.items()}
    return {method: found[method] for method in methods}


def at_the_rate_of_qat(task: Task, methods: Sequence[str], accuracy: Accuracy) -> dict[str, Chosen]:
    """One learning rate for all, chosen with plain QAT; at that rate a radius for each method that has one of its own.

    Values are tried from the smallest up, until one is hopeless.
    """

    def best(method: str, candidates: Sequence[Chosen]) -> Chosen:
        found: dict[Chosen, float] = {}
        for candidate in candidates:
            found[candidate] = accuracy(method, candidate)
            if found[candidate] < max(found.values()) - GIVE_UP:
                break
        return _best(found)

    lr = best(QAT, [Chosen(lr, None) for lr in sorted(task.learning_rates)]).lr
    perturbing = [method for method in methods if METHODS[method].saq is not None]
    needed = {task.radius_of(method) for method in perturbing}
    radii = {m: best(m, [Chosen(lr, rho) for rho in task.radii_of(m)]).rho for m in METHODS if m in needed}
    return {m: Chosen(lr, radii[task.radius_of(m)] if m in perturbing else None) for m in methods}


def _best(found: dict[Chosen, float]) -> Chosen:
    return max(sorted(found, key=lambda c: (c.lr, c.rho or 0.0)), key=found.__getitem__)

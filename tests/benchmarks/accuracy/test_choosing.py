"""How methods get their learning rates and radii, from accuracies by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.accuracy.choosing import Chosen, choose
from benchmarks.accuracy.methods import ADAPTIVE, LONGER, QAT, SAQ
from benchmarks.accuracy.tasks import TASKS
from benchmarks.shared.places import RESULTS


@pytest.fixture
def task():
    return dataclasses.replace(
        TASKS["digits"],
        learning_rates=(1e-3, 2e-3),
        radii=(0.1, 0.2, 0.4),
        adaptive_radii=(1.0, 2.0, 3.0),
        plain_learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
    )


def recorded(score):
    """Accuracy by `score`, and what was asked for."""
    asked = {}

    def accuracy(method, settings):
        asked.setdefault(method, []).append(settings)
        return score(method, settings)

    return accuracy, asked


def test_every_method_has_as_many_trials(task):
    """Rates at the middle radius, then the other radii at the best rate; nothing is left out, however bad."""
    best = {SAQ: Chosen(2e-3, 0.4), "balanced": Chosen(1e-3, 0.2), ADAPTIVE: Chosen(2e-3, 1.0)}
    best |= {QAT: Chosen(5e-4, None), LONGER: Chosen(4e-3, None)}

    def score(method, settings):
        lr, rho = best[method]
        return (settings.lr == lr) + (settings.rho == rho) * 0.5

    accuracy, asked = recorded(score)
    assert choose(task, list(best), accuracy) == best
    assert all(len(tried) == len(set(tried)) == task.trials == 4 for tried in asked.values())
    assert set(asked[SAQ]) == {Chosen(1e-3, 0.2), Chosen(2e-3, 0.2), Chosen(2e-3, 0.1), Chosen(2e-3, 0.4)}
    assert {c.rho for c in asked[ADAPTIVE]} == set(task.adaptive_radii)
    assert {c.lr for c in asked[QAT]} == {c.lr for c in asked[LONGER]} == set(task.plain_learning_rates)


def test_cases_have_the_rate_of_case_3_and_a_radius_of_their_own(task):
    """Whether case 3 is asked for or not; what it found hopeless is not tried."""
    best = {SAQ: Chosen(2e-3, 0.1), "case 2": Chosen(2e-3, 0.1), "case 1": Chosen(2e-3, 0.2)}

    def score(method, settings):
        lr, rho = best[method]
        # The largest radius costs case 3 six points, the middle one four: the first is hopeless, the other is not.
        return (
            (settings.lr == lr)
            - 0.01 * {0.1: 0, 0.2: 4, 0.4: 6}[settings.rho]
            + (settings.rho == rho) * 0.1 * (method != SAQ)
        )

    for methods in (["case 1", SAQ, "case 2"], ["case 2", "case 1"]):
        accuracy, asked = recorded(score)
        chosen = choose(task, methods, accuracy)
        assert list(chosen) == methods
        assert chosen == {method: best[method] for method in methods}
        assert set(asked["case 1"]) == set(asked["case 2"]) == {Chosen(2e-3, 0.1), Chosen(2e-3, 0.2)}
        assert len(asked[SAQ]) == task.trials


def test_the_smaller_of_equals(task):
    accuracy, _ = recorded(lambda method, settings: 0.5)
    assert choose(task, [QAT, SAQ], accuracy) == {QAT: Chosen(5e-4, None), SAQ: Chosen(1e-3, 0.1)}


def test_tasks_of_old_share_the_rate_of_qat(task):
    """And stop where a value is hopeless; a distilled method has the radius of case 3 and no trials."""
    task = dataclasses.replace(task, plain_learning_rates=())
    accuracy, asked = recorded(lambda method, settings: 0.5 - (settings.rho or 0) - settings.lr)
    chosen = choose(task, [QAT, SAQ, "case 3, distilled"], accuracy)
    assert chosen == {QAT: Chosen(1e-3, None)} | dict.fromkeys([SAQ, "case 3, distilled"], Chosen(1e-3, 0.1))
    assert asked == {
        QAT: [Chosen(1e-3, None), Chosen(2e-3, None)],
        SAQ: [Chosen(1e-3, 0.1), Chosen(1e-3, 0.2)],
    }


def test_an_unequal_budget_is_refused(task):
    with pytest.raises(ValueError, match="4 plain_learning_rates; expected 5, as many as learning_rates and radii"):
        dataclasses.replace(task, radii=(0.1, 0.2, 0.3, 0.4))
    with pytest.raises(ValueError, match="expected 3, as many as learning_rates and adaptive_radii"):
        dataclasses.replace(task, adaptive_radii=(1.0, 2.0))


def test_where_there_is_one_of_each_nothing_is_tried(task):
    task = dataclasses.replace(
        task, learning_rates=(2e-3,), plain_learning_rates=(1e-3,), radii=(0.1,), adaptive_radii=(1.0,)
    )
    accuracy, asked = recorded(lambda method, settings: 0.5)
    assert choose(task, [QAT, SAQ, "case 1", ADAPTIVE], accuracy) == {
        QAT: Chosen(1e-3, None),
        SAQ: Chosen(2e-3, 0.1),
        "case 1": Chosen(2e-3, 0.1),
        ADAPTIVE: Chosen(2e-3, 1.0),
    }
    assert not asked


def test_the_pooled_radius_is_the_best_in_the_mean_over_six_methods():
    """As docs/protocol.md says, from the stored trials; and the learning rates are those chosen there."""
    pooled, directory = TASKS["flowers-vit-pooled"], Path(__file__).parents[3] / RESULTS / "accuracy"
    methods = [SAQ, "case 1", "case 2", "last eighth", "last sixth", "head"]

    def validation(method: str, rho: float) -> float:
        name = f"flowers-vit-w4-{method.replace(' ', '-')}-trial-lr0.0003-rho{rho:g}-seed100.json"
        return json.loads((directory / name).read_text())["outcome"]["validation"]

    means = {rho: mean(validation(method, rho) for method in methods) for rho in (0.01, 0.03, 0.1)}
    assert pooled.radii == (max(means, key=means.__getitem__),)
    stored = {
        method: json.loads((directory / f"flowers-vit-w4-{method.replace(' ', '-')}-seed0.json").read_text())
        for method in [QAT, *methods]
    }
    assert pooled.plain_learning_rates == (stored[QAT]["arguments"]["lr"],)
    assert {(stored[method]["arguments"]["lr"],) for method in methods} == {pooled.learning_rates}

"""Write docs/cheaper.md from the trials of the cheaper ways: `python -m benchmarks.accuracy.cheaper.page`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ...shared.command_line import page_paths
from ...shared.markdown import head, row
from ...shared.places import RESULTS
from ...shared.runs import records_in, versions_of
from ..methods import QAT
from ..tasks import TASKS as ALL_TASKS
from .search import BITS, HOPELESS, kept
from .ways import MOBILENET, REFERENCES, SEEDS, TASKS, WAYS

DOCUMENT = "docs/cheaper.md"
Trials = dict[str, dict[str, dict[int, float]]]
"""Validation accuracy in percent, by task, way and seed."""


def trials_of(records: Sequence[dict[str, Any]]) -> Trials:
    found: Trials = {task: {way: {} for way in WAYS} for task in TASKS}
    for record in records:
        a = record["arguments"]
        found[a["task"]][a["method"]][a["seed"]] = 100 * record["outcome"]["validation"]
    return found


def gain(of_task: dict[str, dict[int, float]], way: str) -> float | None:
    """Mean over the seeds of both of what a way has over QAT, in points; `None` if no seed has both."""
    seeds = sorted(set(of_task[way]) & set(of_task[QAT]))
    return mean(of_task[way][seed] - of_task[QAT][seed] for seed in seeds) if seeds else None


def ranking(trials: Trials) -> list[tuple[str, float]]:
    """Ways that were tried on all tasks with all seeds, the largest mean gain first."""
    complete = [way for way in WAYS if all(set(trials[task][way]) >= set(SEEDS) for task in TASKS)]
    gains = {way: [gain(trials[task], way) for task in TASKS] for way in complete if way not in REFERENCES}
    means = {way: mean(g for g in found if g is not None) for way, found in gains.items()}
    return sorted(means.items(), key=lambda pair: -pair[1])


def shares_of(of_task: dict[str, dict[int, float]]) -> dict[str, float]:
    """What each way that was tried on a task keeps of the gain of two passes there; empty without the references."""
    means = {way: mean(by_seed.values()) for way, by_seed in of_task.items() if by_seed}
    return kept(means) if set(REFERENCES) <= set(means) else {}


def table(task: str, of_task: dict[str, dict[int, float]]) -> list[str]:
    """Every way that was tried on a task."""
    shares = shares_of(of_task)
    lines = [
        f"## {ALL_TASKS[task].title}, W{BITS}A{BITS}",
        "",
        *head("way", "passes", "radius", f"validation %, seeds {', '.join(map(str, SEEDS))}", "gain over QAT", "kept"),
    ]
    for way, found in of_task.items():
        if not found:
            continue
        of_way, plain = WAYS[way], way == QAT
        by_seed = ", ".join(f"{found[seed]:.2f}" for seed in sorted(found))
        share = "-" if plain or not shares else f"{100 * shares[way]:.0f}%" if shares[way] > 0 else "nothing"
        radius = "-" if of_way.saq is None else f"{of_way.radii[task]:g}"
        gained = gain(of_task, way)
        shown = "-" if plain or gained is None else f"{gained:+.2f}"
        lines.append(row(way, f"{of_way.passes:.2f}", radius, f"{by_seed} ({mean(found.values()):.2f})", shown, share))
    return [*lines, ""]


def page(records: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    trials = trials_of(records)
    shares = shares_of(trials[MOBILENET])
    dropped = [way for way, share in shares.items() if way not in REFERENCES and share < HOPELESS]
    lines = [
        "# A pass and an eighth on pretrained models: what was tried",
        "",
        "Written by `python -m benchmarks.accuracy.cheaper.page` from `benchmarks/results/cheaper`; `make cheaper` "
        "runs what is missing there. The rules are in [protocol.md](protocol.md), as they were before the runs.",
        "",
        "Validation images and trial seeds only: this page chooses, and what was chosen is reported in "
        "[results.md](results.md). Two seeds differ by a point or so, so that ways a point apart are not told from "
        "each other here. Kept: gain over QAT relative to that of case 3, whose two passes are to be saved.",
        "",
    ]
    for task in TASKS:
        lines += table(task, trials[task])
    ranked = ranking(trials)
    if ranked:
        lines += [
            "## Both tasks",
            "",
            *head("way", "mean gain over QAT", "why it was tried"),
            *(row(way, f"{value:+.2f}", WAYS[way].why) for way, value in ranked),
            "",
        ]
    if dropped:
        lines += [
            f"Not tried on the second task, as less than {HOPELESS:.0%} of the gain was kept on the first: "
            f"{'; '.join(f'{way} ({WAYS[way].why})' for way in dropped)}.",
            "",
        ]
    lines += ["## Versions", "", *(f"- {line}" for line in versions_of(records)), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    results, document = page_paths(argv, __doc__ or "", f"{RESULTS}/cheaper", DOCUMENT)
    Path(document).write_text(page(records_in(Path(results))), encoding="utf-8")


if __name__ == "__main__":
    main()

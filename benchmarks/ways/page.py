"""docs/ways.md, made of stored results and of nothing else."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..shared.markdown import head
from ..shared.markdown import row as table_row
from ..shared.paired import Difference
from ..shared.runs import versions_of
from ..shared.schedule_variants import FULL, QAT
from .bundles import bundled_records
from .rows import Table, full_gain, gain, mean_minus, minus, share_of_full, table_of, verdict
from .tasks import TASKS
from .ways import WAYS

INTRODUCTION = """# Further ways to pay less for sharpness, or to gain more

Written by `make ways` from the runs in `benchmarks/results/ways`. Each way was tried on two tasks
that take seconds, so that all of them could be tried with the same care; what loses here is not in the package, and
what wins here still has to win on the tasks of [results.md](results.md) before it becomes a default.
"""

PROTOCOL = """## How they were compared

- scikit-learn's digits. A seed draws training images and trains a float model on them; every way starts from it.
  AdamW, cosine to zero, no augmentation, 8 bits in the first and last layer.
- Every way has four trials on validation images, each with the same two seeds, which are not among the reported ones.
  Plain ways try four learning rates; the others two of these, then two more settings at the better rate. A setting is
  a radius, or, at the radius that the way it builds on has chosen, a number of the way's own.
- Batch-norm statistics are estimated anew on the training images for all ways, plain QAT included.
- Sixteen seeds were planned; the stored runs stop at ten, when the time for them was over.
- Seeds are paired; accuracy after the last step on images that chose nothing; 95 % intervals by Student's t.
- The rule, written before the reported runs: a way is worth keeping if its difference to what it builds on has an
  interval above zero on one task and not below zero on the other; where the package has a way at its price, the mean
  over both tasks must not be below that one's either.
- After seven seeds had been seen, two things were changed. Averaged and frozen plain training had been given rates
  that lacked QAT's own best on the CNN; their runs were discarded, and they now try QAT's rate and half of it. And
  controls were added, which share the choices of a way without trials of their own. That a way which passes the rule
  must beat its control as well is what [protocol.md](protocol.md) asks, but was applied after all seeds had been seen;
  it turned one verdict, "full + clean scales", from kept to dropped.
- Two trial seeds choose roughly. A part of what looks like gain or loss of a way is that of its learning rate, as the
  controls show; plain QAT with an average or with frozen weights lost where the trials chose another rate than QAT's.
- Passes are counted images that went forward and backward; time is processor time of training, one thread, the median
  over seeds, on a machine that did other work at the time. Both relative to plain QAT. These models are so small that
  a step is mostly Python: a pass over an eighth of a batch takes nearly as long as one over all of it. On models of
  users' size time follows passes, see [cost.md](cost.md).
"""


def write_page(results: Path, document: Path) -> None:
    """Write the page to `document`."""
    records = bundled_records(results)
    table = table_of(records)
    parts = [INTRODUCTION, *(task_table(table, task) for task in table), average_table(table), verdicts(table)]
    parts += [PROTOCOL, choices(table), versions(records)]
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def task_table(table: Table, task: str) -> str:
    ways, full = table[task], full_gain(table, task)
    lines = [
        f"## {TASKS[task].title}",
        "",
        f"{TASKS[task].images} training images, {ways[QAT].chosen['epochs']} epochs.",
        "",
        *head("way to train", "passes", "time", "seeds", "top-1 %", "gain over QAT", "of full's gain"),
    ]
    for way, runs in ways.items():
        test = [*runs.test.values()]
        spread = f" ± {stdev(test):.2f}" if len(test) > 1 else ""
        own = gain(table, task, way) if way != QAT else None
        cells = [
            way,
            f"{runs.passes / ways[QAT].passes:.2f}",
            f"{runs.seconds / ways[QAT].seconds:.2f}",
            str(len(test)),
            f"{mean(test):.2f}{spread}",
        ]
        lines.append(table_row(*cells, shown(own), percent(share_of_full(own, full))))
    return "\n".join(lines) + "\n"


def average_table(table: Table) -> str:
    lines = [
        "## Both tasks together",
        "",
        *head("way to train", "passes", "time", "gain over QAT", "of full's gain", "builds on", "gain over that"),
    ]
    full = mean_minus(table, FULL, QAT)
    for name, way in WAYS.items():
        if name == QAT or (own := mean_minus(table, name, QAT)) is None:
            continue
        passes = mean(ways[name].passes / ways[QAT].passes for ways in table.values())
        seconds = mean(ways[name].seconds / ways[QAT].seconds for ways in table.values())
        cells = [name, f"{passes:.2f}", f"{seconds:.2f}", str(own), percent(share_of_full(own, full)), way.builds_on]
        lines.append(table_row(*cells, shown(mean_minus(table, name, way.builds_on))))
    return "\n".join(lines) + "\n\nThe plain mean of the two tasks' differences of one seed, and its interval.\n"


def verdicts(table: Table) -> str:
    """Say in one line for each way what it does, whether it is kept, and by which numbers."""
    words = {
        "keep": "kept",
        "drop": "dropped",
        "fails its control": "dropped, since its control does as well",
        "for comparison": "for comparison",
        None: "not finished",
    }
    lines = ["## What is kept", ""]
    shown_intervals = 0
    for name, way in WAYS.items():
        if name == QAT or not any(name in ways for ways in table.values()):
            continue
        against = [other for other in (way.builds_on, way.rival, way.control) if other]
        told = []
        for other in against:
            found = {task: minus(table, task, name, other) for task in table}
            shown_intervals += len(found)
            told.append(f"minus {other} " + ", ".join(f"{shown(d)} ({task})" for task, d in found.items()))
        lines.append(f"- **{name}** ({way.why}): {words[verdict(table, name)]}; {'; '.join(told)}.")
    lines += [
        "",
        f"{shown_intervals} intervals of 95 %, uncorrected: one in twenty misses its mean by chance alone. A way that "
        "is dropped was not shown to be useless; it has not earned an argument here.",
    ]
    return "\n".join(lines) + "\n"


def choices(table: Table) -> str:
    """Tell what each way has chosen, so that a choice at the end of its range can be seen."""
    lines = [
        "## What the trials chose",
        "",
        "Radii to choose from are the task's "
        + ", ".join(f"{TASKS[task].radius:g} ({task})" for task in table)
        + " times 1/2, 1 and 2 unless `benchmarks/ways/ways.py` says otherwise.",
        "",
        *head("way to train", *(f"{task}: learning rate, radius, own" for task in table)),
    ]
    for name in WAYS:
        if not any(name in ways for ways in table.values()):
            continue
        lines.append(table_row(name, *(chosen(ways[name].chosen) if name in ways else "-" for ways in table.values())))
    return "\n".join(lines) + "\n"


def chosen(arguments: dict[str, Any]) -> str:
    own = "".join(f", {name} {value:g}" for name, value in arguments["own"].items())
    radius = "-" if WAYS[arguments["way"]].saq is None else f"{arguments['rho']:g}"
    return f"{arguments['lr']:g}, {radius}{own}"


def versions(records: list[dict[str, Any]]) -> str:
    seconds = sum(r["outcome"]["cpu_seconds"] for r in records)
    trials = sum(r["arguments"]["kind"] == "trial" for r in records)
    return (
        f"## Versions\n\n{'; '.join(versions_of(records))}. {len(records) - trials} reported runs and {trials} trials "
        f"took {seconds / 60:.0f} minutes of one processor.\n"
    )


def shown(found: Difference | None) -> str:
    return "-" if found is None else str(found)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"

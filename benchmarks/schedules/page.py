"""docs/schedules.md and its plot, made of stored results and of nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_saq.sharpness.schedules import KNOBS, PRESETS

from ..shared.markdown import head
from ..shared.markdown import row as table_row
from ..shared.runs import records_in, versions_of
from ..shared.schedule_variants import ECHOED, FULL, QAT, VARIANTS
from .plot import draw_plot
from .rows import Row, share_of, table_rows

KEPT = 0.9
"""The share of full SAQ's gain that a schedule is to keep."""


def write_page(results: Path, step_cost: Path, document: Path) -> None:
    """Write the page to `document`, and beside it the plot, under the same name and `.svg`."""
    records = records_in(results)
    cost = json.loads(step_cost.read_text(encoding="utf-8")) if step_cost.is_file() else None
    rows = table_rows([r for r in records if r["arguments"]["kind"] == "run"], cost and cost["outcome"]["times"])
    document.parent.mkdir(parents=True, exist_ok=True)
    plot = document.with_suffix(".svg")
    presets = {method: name for name, method in preset_methods().items()}
    drawn = draw_plot(rows, presets, plot)
    document.write_text(page(rows, records, cost, plot.name if drawn else None), encoding="utf-8")


def page(rows: list[Row], records: list[dict[str, Any]], cost: dict[str, Any] | None, plot: str | None) -> str:
    parts = [
        "# What schedules keep of the gain, and what they cost\n\n"
        "Written by `make schedules` from the runs in `benchmarks/results/schedules` and "
        "`benchmarks/results/step_cost`.\n",
        table(rows),
        f"![Gain over plain QAT against relative cost]({plot})\n" if plot else "",
        findings(rows),
        task(records),
        trials(records),
        versions(records, cost),
    ]
    return "\n".join(part for part in parts if part)


def table(rows: list[Row]) -> str:
    full = next((row for row in rows if row.method == FULL), None)
    presets = {method: name for name, method in preset_methods().items()}
    lines = [
        *head(
            *("way to train", "passes", "time", "perturbed steps"),
            *("seeds", "top-1 %", "gain, 95 % interval", "of full's gain"),
        ),
    ]
    for row in rows:
        name = row.method + (f' (`schedule="{presets[row.method]}"`)' if row.method in presets else "")
        cost = "-" if row.cost is None else f"{row.cost:.2f}"
        spread = f" ± {stdev(row.test):.2f}" if len(row.test) > 1 else ""
        gain = "-" if row.method == QAT else str(row.gain)
        share = share_of(row, full) if full and row.method != QAT else math.nan
        cells = [
            name,
            f"{row.passes:.2f}",
            cost,
            f"{row.perturbed_share:.0%}",
            str(len(row.seeds)),
            f"{mean(row.test):.2f}{spread}",
            gain,
        ]
        lines.append(table_row(*cells, "-" if math.isnan(share) else f"{share:.0%}"))
    lines += [
        "",
        "Mean and standard deviation over seeds; gains are differences to plain QAT with the same seed, in points, "
        "with Student's interval for their mean. Passes: forward and backward passes over those of plain QAT, as the "
        "schedule says; time: as measured, see [cost.md](cost.md) (a dash where it was not).",
    ]
    return "\n".join(lines) + "\n"


def preset_methods() -> dict[str, str]:
    """Which way to train each preset is, where it is one of them."""
    found = {}
    for name, knobs in PRESETS.items():
        for method, config in VARIANTS.items():
            # The control shares the knobs of what it controls, at radius 0.
            if method != ECHOED and {**PRESETS["full"], **config} == {key: knobs[key] for key in KNOBS}:
                found[name] = method
    return found


def findings(rows: list[Row]) -> str:
    """What the intervals allow to say, and no more."""
    by_method = {row.method: row for row in rows}
    full = by_method.get(FULL)
    if full is None or math.isnan(full.gain.half_width):
        return ""
    lines = ["## What this says", ""]
    if full.gain.sign > 0:
        kept = [r for r in rows if r.method in VARIANTS and r.method not in (QAT, FULL) and r.passes < full.passes]
        kept = sorted((r for r in kept if share_of(r, full) >= KEPT), key=lambda r: r.passes)
        lines.append(f"Full SAQ gains over plain QAT: {full.gain} points.")
        if kept:
            lines.append(
                f"Cheapest with at least {KEPT:.0%} of that mean gain: {kept[0].method}, with "
                f"{kept[0].passes:.2f} times the passes of QAT."
            )
        else:
            lines.append(f"No cheaper schedule keeps {KEPT:.0%} of that mean gain.")
    else:
        lines.append(
            f"Full SAQ against plain QAT: {full.gain} points, an interval that contains zero or "
            "lies below it. So this "
            "task shows no gain that a schedule could keep, and shares of it mean nothing; it tells "
            "schedules apart only "
            "where their intervals lie apart."
        )
    for row in rows:
        if row.method not in (QAT, FULL) and row.gain.sign:
            direction = "above" if row.gain.sign > 0 else "below"
            lines.append(f"{row.method}: {row.gain}, an interval {direction} zero.")
    lines.append(
        "The presets were chosen by this very table, and smaller shares of a batch were added to it when the larger "
        "one had come out well, so a preset's own figures flatter it a little."
    )
    lines.append(
        f"{len(rows) - 1} intervals of 95 % are shown, uncorrected: one in twenty misses its mean by chance alone."
    )
    return "\n".join([*lines[:2], *(f"- {line}" for line in lines[2:])]) + "\n"


def task(records: list[dict[str, Any]]) -> str:
    runs = [r for r in records if r["arguments"]["kind"] == "run"]
    first = next(r for r in runs if r["arguments"]["method"] == QAT)
    a = first["arguments"]
    full = next((r["arguments"] for r in runs if r["arguments"]["method"] == FULL), a)
    others = {r["arguments"]["method"]: r["arguments"]["rho"] for r in runs}
    own = [f"{rho:g} for {m}" for m, rho in others.items() if rho not in (None, full["rho"])]
    floats = {r["arguments"]["seed"]: 100 * r["outcome"]["float_test"] for r in runs}
    lines = [
        "## The task",
        "",
        f"scikit-learn's digits, a tiny ViT, W2A2 with 8 bits in the first and last layer. Each seed draws "
        f"{a['images']} training images of {a['pool']} and trains a float model for {a['float_epochs']} epochs "
        f"(learning rate {a['float_learning_rate']:g}, {mean(floats.values()):.2f} % on the test "
        "images); every way to "
        f"train starts from it: {a['epochs']} epochs, {first['outcome']['steps']} steps of AdamW, cosine to zero, no "
        f"augmentation. Learning rate {a['lr']:g} for QAT, {full['lr']:g} with radius "
        f"{full['rho'] or 0:g} for the others"
        f"{'; radius ' if own else ''}{', '.join(own)}. `benchmarks/shared/digits_training.py` is all of it.",
    ]
    return "\n".join(lines) + "\n"


def trials(records: list[dict[str, Any]]) -> str:
    """Mean validation accuracy of every learning rate and radius that was tried."""
    scores: dict[tuple[str, float, float], list[float]] = {}
    for record in records:
        a = record["arguments"]
        if a["kind"] == "trial":
            scores.setdefault((a["method"], a["lr"], a["rho"] or 0.0), []).append(
                100 * record["outcome"]["validation"]
            )
    if not scores:
        return ""
    a = next(r["arguments"] for r in records if r["arguments"]["kind"] == "trial")
    lines = [
        "## Learning rates and radii that were tried",
        "",
        f"Mean top-1 on {a['validation_images']} images that are neither trained nor tested on, with "
        "seeds of their own. "
        "The radius was chosen at QAT's learning rate, the learning rate once more at that radius, "
        "and then the radii of those that have one of their own. That adaptive, previous and stale were given "
        "radii of their own, and the others not, was decided after test gains of the first seeds had been seen; "
        "that echo has them, before any run of it.",
        "",
        *head("way to train", "learning rate", "radius", "validation %", "seeds"),
    ]
    for (method, lr, rho), values in sorted(scores.items(), key=lambda item: (item[0][0] != QAT, *item[0][1:])):
        lines.append(table_row(method, f"{lr:g}", f"{rho:g}", f"{mean(values):.2f}", str(len(values))))
    return "\n".join(lines) + "\n"


def versions(records: list[dict[str, Any]], cost: dict[str, Any] | None) -> str:
    found = versions_of([*records, *([cost] if cost else [])])
    seconds = sum(r["outcome"]["cpu_seconds"] for r in records)
    return f"## Versions\n\n{'; '.join(found)}. Training took {seconds / 60:.0f} minutes of one processor.\n"

"""docs/schedules.md and its plot, made of stored results and of nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_saq.sharpness.schedules.schedule import KNOBS, PRESETS

from ..shared.paired import half_width
from ..shared.schedule_variants import FULL, QAT, VARIANTS, saq_config

KEPT = 0.9
"""The share of full SAQ's gain that a schedule is to keep."""


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        seeds: Those that plain QAT was trained with as well.
        test: Test accuracy of each, in percent.
        gains: Its difference to plain QAT with the same seed, in points.
        half_width: Of the 95 % interval of the mean difference (Student's t); NaN for a single seed.
        passes: Forward and backward passes of the training over those of plain QAT, as the schedule says.
        cost: Time of training over that of plain QAT; `None` if it was not measured.
        perturbed_share: Of the steps.
    """

    method: str
    seeds: list[int]
    test: list[float]
    gains: list[float]
    half_width: float
    passes: float
    cost: float | None
    perturbed_share: float

    @property
    def gain(self) -> float:
        return mean(self.gains)

    @property
    def interval(self) -> str:
        return f"{self.gain:+.2f} [{self.gain - self.half_width:+.2f}, {self.gain + self.half_width:+.2f}]"


def share_of(row: Row, full: Row) -> float:
    """Mean gain over that of full SAQ with the same seeds; NaN where that is not positive."""
    gains = [gain for seed, gain in zip(full.seeds, full.gains, strict=True) if seed in row.seeds]
    return row.gain / mean(gains) if gains and mean(gains) > 0 else math.nan


def write_page(results: Path, step_cost: Path, document: Path) -> None:
    """Write the page to `document`, and beside it the plot, under the same name and `.svg`."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    cost = json.loads(step_cost.read_text(encoding="utf-8")) if step_cost.is_file() else None
    rows = table_rows([r for r in records if r["arguments"]["kind"] == "run"], cost and cost["outcome"]["times"])
    document.parent.mkdir(parents=True, exist_ok=True)
    plot = document.with_suffix(".svg")
    drawn = draw_plot(rows, plot)
    document.write_text(page(rows, records, cost, plot.name if drawn else None), encoding="utf-8")


def table_rows(runs: Sequence[dict[str, Any]], times: dict[str, Any] | None) -> list[Row]:
    """One row for each method, in the order of `VARIANTS`, of the seeds that it shares with plain QAT.

    Raises:
        ValueError: If there is no run of plain QAT.
    """
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["arguments"]["method"], {})[run["arguments"]["seed"]] = run
    if QAT not in by_method:
        raise ValueError(f"found {len(runs)} results, of {sorted(by_method)}; expected some of {QAT}.")
    plain = by_method[QAT]
    order = [QAT, *(m for m in by_method if m not in VARIANTS), *(m for m in VARIANTS if m != QAT)]
    rows = []
    for method in order:
        own = by_method.get(method, {})
        seeds = sorted(set(own) & set(plain))
        if seeds:
            test = [100 * own[seed]["outcome"]["test"] for seed in seeds]
            gains = [t - 100 * plain[seed]["outcome"]["test"] for t, seed in zip(test, seeds, strict=True)]
            share = mean(own[seed]["outcome"]["perturbed_share"] for seed in seeds)
            epochs = own[seeds[0]]["arguments"]["epochs"] / plain[seeds[0]]["arguments"]["epochs"]
            config = own[seeds[0]]["arguments"]["config"]
            passes, cost = epochs * passes_of(config, share), relative_cost(method, config, times, share)
            rows.append(Row(method, seeds, test, gains, half_width(gains), passes, cost and epochs * cost, share))
    return rows


def passes_of(config: dict[str, Any], share: float) -> float:
    """Of a step, on average; `share` of the steps were perturbed."""
    if config.get("case", 3) is None:
        return 1.0
    schedule = saq_config(0.0, config).perturbation_schedule()
    return 1 + share if schedule.trigger else schedule.cost


def relative_cost(method: str, config: dict[str, Any], times: dict[str, Any] | None, share: float) -> float | None:
    """Time of a step over that of a plain one, from the medians of `step_cost.py`.

    `start` perturbs in full after a part of training. The trigger was timed with every second step firing; here
    `share` of the steps did.
    """
    if config.get("case", 3) is None:
        return 1.0
    if times is None:
        return None
    if "start" in config:
        return config["start"] + (1 - config["start"]) * times[FULL]["ratio"] if FULL in times else None
    if method not in times:
        return None
    if config.get("trigger"):
        return 1 + share * 2 * (times[method]["ratio"] - 1)
    return times[method]["ratio"]


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
        "| way to train | passes | time | perturbed steps | seeds | top-1 % | gain, 95 % interval | of full's gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row.method + (f' (`schedule="{presets[row.method]}"`)' if row.method in presets else "")
        cost = "-" if row.cost is None else f"{row.cost:.2f}"
        spread = f" ± {stdev(row.test):.2f}" if len(row.test) > 1 else ""
        gain = "-" if row.method == QAT else row.interval
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
        lines.append("| " + " | ".join([*cells, "-" if math.isnan(share) else f"{share:.0%}"]) + " |")
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
            defaults: dict[str, Any] = {"interval": 1, "ascent_fraction": 1.0, "reuse": None, "trigger": False}
            if {**defaults, **config} == {key: knobs[key] for key in KNOBS}:
                found[name] = method
    return found


def findings(rows: list[Row]) -> str:
    """What the intervals allow to say, and no more."""
    by_method = {row.method: row for row in rows}
    full = by_method.get(FULL)
    if full is None or math.isnan(full.half_width):
        return ""
    lines = ["## What this says", ""]
    if full.gain - full.half_width > 0:
        kept = [r for r in rows if r.method in VARIANTS and r.method not in (QAT, FULL) and r.passes < full.passes]
        kept = sorted((r for r in kept if share_of(r, full) >= KEPT), key=lambda r: r.passes)
        lines.append(f"Full SAQ gains over plain QAT: {full.interval} points.")
        if kept:
            lines.append(
                f"Cheapest with at least {KEPT:.0%} of that mean gain: {kept[0].method}, with "
                f"{kept[0].passes:.2f} times the passes of QAT."
            )
        else:
            lines.append(f"No cheaper schedule keeps {KEPT:.0%} of that mean gain.")
    else:
        lines.append(
            f"Full SAQ against plain QAT: {full.interval} points, an interval that contains zero or "
            "lies below it. So this "
            "task shows no gain that a schedule could keep, and shares of it mean nothing; it tells "
            "schedules apart only "
            "where their intervals lie apart."
        )
    for row in rows:
        if row.method not in (QAT, FULL) and not math.isnan(row.half_width) and abs(row.gain) > row.half_width:
            direction = "above" if row.gain > 0 else "below"
            lines.append(f"{row.method}: {row.interval}, an interval {direction} zero.")
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
        "radii of their own, and the others not, was decided after test gains of the first seeds had been seen.",
        "",
        "| way to train | learning rate | radius | validation % | seeds |",
        "|---|---|---|---|---|",
    ]
    for (method, lr, rho), values in sorted(scores.items(), key=lambda item: (item[0][0] != QAT, *item[0][1:])):
        lines.append(f"| {method} | {lr:g} | {rho:g} | {mean(values):.2f} | {len(values)} |")
    return "\n".join(lines) + "\n"


def versions(records: list[dict[str, Any]], cost: dict[str, Any] | None) -> str:
    found = sorted(
        {", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in [*records, *([cost] if cost else [])]}
    )
    seconds = sum(r["outcome"]["cpu_seconds"] for r in records)
    return f"## Versions\n\n{'; '.join(found)}. Training took {seconds / 60:.0f} minutes of one processor.\n"


def draw_plot(rows: list[Row], path: Path) -> bool:
    """Gain with its interval against measured time, against passes unless all were measured; `False` if not drawn."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing, `pip install '.[card]'`", flush=True)
        return False
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "schedules"  # the same bytes for the same results
    measured = all(row.cost is not None for row in rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="0.6", linewidth=1)
    for number, row in enumerate(rows):
        x = row.cost if measured and row.cost is not None else row.passes
        error = 0 if math.isnan(row.half_width) else row.half_width
        color = f"C{number % 10}"
        axes.errorbar(x, row.gain, yerr=error, fmt="o", color=color, elinewidth=1, alpha=0.8)
        place = (5, 4 if number % 2 else -11)
        axes.annotate(row.method, (x, row.gain), place, textcoords="offset points", fontsize=8, color=color)
    axes.set_xlabel("time of training, plain QAT = 1" if measured else "passes of training, plain QAT = 1")
    axes.set_ylabel("gain in top-1 over plain QAT, points")
    figure.savefig(path, format="svg", metadata={"Date": None})
    return True

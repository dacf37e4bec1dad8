"""docs/flatness.md and its plots, made of the stored minima and of nothing else.

python -m benchmarks.accuracy.minima.page [results] [document]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ...shared.command_line import page_paths
from ...shared.markdown import head, row
from ...shared.paired import Difference
from ...shared.places import RESULTS
from ...shared.runs import records_in, versions_of
from ..methods import ECHO, QAT, SAQ
from .findings import MEASURES, Minima, landscapes_of, minima_of, mixed_of
from .measured import LOOKED_AT
from .plots import draw_accuracies, draw_landscape, draw_ratios

POSITIVE = ("steepest rise", "adaptive rise", "largest eigenvalue", "trace")
"""Measures that are compared by their ratio."""
PICTURED = "cifar-resnet"
"""Task of docs/landscape.svg, if it has landscapes; else the first one that has."""


def main(argv: Sequence[str] | None = None) -> None:
    write_page(*page_paths(argv, __doc__, f"{RESULTS}/minima", "docs/flatness.md"))


def write_page(results: Path, document: Path) -> None:
    """Write the page to `document`, and the plots beside it.

    Raises:
        ValueError: If no minimum in `results` was looked at.
    """
    records = records_in(results)
    settings = [s for s in minima_of(records) if QAT in s.runs and SAQ in s.runs]
    if not settings:
        raise ValueError(f"{results}: found no minima of QAT and SAQ; run `make flatness` first.")
    document.parent.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for setting in settings:
        file = document.with_name(f"{document.stem}_{setting.task.replace('-', '_')}.svg")
        if draw_landscape(setting.name, landscapes_of(records, setting), file):
            pictures[setting.task] = file.name
    if pictures:
        chosen = pictures.get(PICTURED) or next(iter(pictures.values()))
        document.with_name("landscape.svg").write_bytes(document.with_name(chosen).read_bytes())
    several = [s for s in settings if len(s.complete_seeds()) > 1]
    ratios, accuracies = (f"{document.stem}_{name}.svg" for name in ("ratios", "accuracy"))
    parts = [
        "# Are the minima of SAQ flatter, and does it matter?\n\nWritten by `make flatness` and `make "
        f"mixed-precision` from the runs in `{results.as_posix()}`; no figure is typed by hand. How each comes about "
        "is at the end.\n",
        is_it_flatter(settings),
        f"![Ratios]({ratios})\n" if draw_ratios(several, POSITIVE, SAQ, document.with_name(ratios)) else "",
        *(table(setting) for setting in settings),
        "\n".join(["## Landscapes\n", *(f"![Landscape]({name})\n" for name in pictures.values())]) if pictures else "",
        does_it_predict(several) if several else "",  # two points always have a rank correlation of one
        f"![Accuracy and sharpness]({accuracies})\n"
        if draw_accuracies(several, "steepest rise", document.with_name(accuracies))
        else "",
        mixed_precision(records),
        how(records),
    ]
    document.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def is_it_flatter(settings: Sequence[Minima]) -> str:
    """Yes or no for every task and measure."""
    lines = [
        "## Is the minimum of SAQ flatter than that of plain QAT?",
        "",
        "Sharpness of SAQ (case 3) over that of QAT from the same float model, geometric mean over seeds with its 95 "
        "% interval. **Bold**: the interval does not contain 1.",
        "",
        *head("task", "seeds", *POSITIVE),
    ]
    for setting in settings:
        cells = [shown_ratio(setting.ratio(SAQ, measure)) for measure in POSITIVE]
        lines.append(row(setting.name, str(len(set(setting.test(SAQ)) & set(setting.test(QAT)))), *cells))
    lines.append("")
    for measure in POSITIVE:
        ratios = [ratio for s in settings if (ratio := s.ratio(SAQ, measure)) is not None]
        signs = [ratio.sign for ratio in ratios if not math.isnan(ratio.half_width)]  # a single seed says neither
        lines.append(f"- {measure}: {answer(signs)}")
    lines += [
        "",
        "Rises look at a ball of radius rho, eigenvalue and trace at its centre alone. One reading of the difference: "
        "QAT fits its training images more closely (loss in the tables below), and where predictions are nearly "
        "certain the curvature vanishes with the loss, however steep the walls around are.",
    ]
    return "\n".join(lines) + "\n"


def answer(signs: Sequence[int]) -> str:
    """Count tasks whose interval lies below 1 (flatter), above it, or contains it."""
    flatter, sharper = (sum(sign == s for sign in signs) for s in (-1, 1))
    verdict = "no" if not flatter else "yes" if flatter == len(signs) else "not everywhere"
    return (
        f"**{verdict}**; flatter in {flatter} of {len(signs)} tasks, sharper in {sharper}, no difference was seen in "
        f"{len(signs) - flatter - sharper}."
    )


def shown_ratio(ratio: Difference | None) -> str:
    if ratio is None:
        return "-"
    text = f"{math.exp(ratio.mean):.2f}"
    if not math.isnan(ratio.half_width):
        ends = (math.exp(ratio.mean - ratio.half_width), math.exp(ratio.mean + ratio.half_width))
        text += f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    return f"**{text}**" if ratio.sign else text


def table(setting: Minima) -> str:
    lines = [
        f"### {setting.name}",
        "",
        *head("method", "seeds", "top-1 %", "training loss at Q(w)", *MEASURES),
    ]
    for method in setting.runs:
        values = [f"{mean(setting.values(method, measure).values()):.3g}" for measure in MEASURES]
        test, losses = setting.test(method), setting.losses(method)
        lines.append(
            row(method, str(len(test)), f"{mean(test.values()):.2f}", f"{mean(losses.values()):.3g}", *values)
        )
    return "\n".join(lines) + "\n"


def does_it_predict(settings: Sequence[Minima]) -> str:
    """Rank correlations of flatness and accuracy."""
    lines = [
        "## Does flatness predict accuracy?",
        "",
        "Spearman's rank correlation of flatness (minus the sharpness) and test accuracy: above zero, flatter minima "
        "score better. *Methods*: over the methods of one seed, which start from one float model; mean over seeds "
        "with Student's 95 % interval. *All*: over all methods and seeds, with the interval of seeds drawn again. "
        "**Bold**: the interval does not contain zero.",
        "",
        *head("task", "methods x seeds", "over", *MEASURES),
    ]
    for setting in settings:
        size = f"{len(setting.runs)} x {len(setting.complete_seeds())}"
        within = [setting.within_seeds(measure) for measure in MEASURES]
        lines.append(row(setting.name, size, "methods", *("-" if d is None else marked(d) for d in within)))
        lines.append(row("", "", "all", *(marked_interval(*setting.over_all(measure)) for measure in MEASURES)))
    return "\n".join(lines) + "\n"


def marked(found: Difference) -> str:
    return f"**{found}**" if found.sign else str(found)


def marked_interval(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "-"
    if math.isnan(low):
        return f"{value:+.2f}"
    text = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def mixed_precision(records: Sequence[dict[str, Any]]) -> str:
    """Bits by budget against uniform bits."""
    found = mixed_of(records)
    if not found:
        return ""
    lines = [
        "## Bits where they matter, at the cost of uniform ones",
        "",
        "Plain QAT, the same steps and learning rate for both. Bits by budget come from "
        "`hf_saq.analysis.allocate_bits` on training images, for the bit operations of uniform bits. The gain is "
        "paired by seed, in points, with its 95 % interval.",
        "",
        *head("task", "seeds", "uniform %", "by budget %", "gain"),
    ]
    for mixed in found:
        both = sorted(set(mixed.uniform) & set(mixed.mixed))
        if not both or mixed.gain is None:
            continue
        values = [f"{mean(of[s] for s in both):.2f}" for of in (mixed.uniform, mixed.mixed)]
        lines.append(row(mixed.name, str(len(both)), *values, marked(mixed.gain)))
    for mixed in found:
        lines += ["", f"Mean bits of the layers, {mixed.name}:", "", *head("layer", "weights", "activations")]
        lines += [row(name, f"{w:.1f}", f"{a:.1f}") for name, (w, a) in mixed.mean_bits().items()]
    return "\n".join(lines) + "\n"


def how(records: Sequence[dict[str, Any]]) -> str:
    measured = [r["arguments"]["measured"] for r in records if "measured" in r["arguments"]]
    pairs = sorted(
        {
            (r["arguments"]["task"], m["rho"], m["adaptive_rho"])
            for r in records
            if (m := r["arguments"].get("measured"))
        }
    )
    radii = "; ".join(f"{task} {rho:g} and {adaptive:g} (adaptive)" for task, rho, adaptive in pairs)
    seconds = sum(r["outcome"].get("cpu_seconds", 0) + r["outcome"].get("sharpness_cpu_seconds", 0) for r in records)
    return (
        "## How\n\nTasks, float models, learning rates and radii are those of [results.md](results.md): the learning "
        f"rate is chosen with plain QAT and used by all, `{ECHO}` takes the radius of case 3. Sharpness is measured "
        f"by `hf_saq.analysis.sharpness` after the last step, on at most {LOOKED_AT} training images without "
        "augmentation, in batches of the training's size, in evaluation mode, with one radius for all methods of a "
        f"task: {radii}. Rises are in nats. Landscapes are those of the first seed. All models were "
        "trained for this page: accuracies differ a little from those of results.md at the same settings, which are "
        "runs of other commits.\n\n"
        f"{'; '.join(versions_of(records))}. {len(measured)} minima; training and measuring took {seconds / 60:.0f} "
        "minutes of one processor.\n"
    )


if __name__ == "__main__":
    main()

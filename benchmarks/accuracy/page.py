"""docs/results.md and its plots, made of the stored runs of the sweep and of nothing else.

python -m benchmarks.accuracy.page [results] [document]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..shared.command_line import page_paths
from ..shared.markdown import head, row
from ..shared.places import RESULTS
from ..shared.runs import records_in, versions_of
from .methods import METHODS, QAT, QUARTER, SAQ
from .plots import draw_gains, draw_sizes
from .settings import settings_of, size_studies, training_images
from .tables import cheaper, claims, size_table, table
from .task import Task
from .tasks import TASKS


def main(argv: Sequence[str] | None = None) -> None:
    write_page(*page_paths(argv, __doc__, f"{RESULTS}/accuracy", "docs/results.md"))


def write_page(results: Path, document: Path) -> None:
    """Write the page to `document`, and the plots beside it.

    Raises:
        ValueError: If there is no run of plain QAT in `results`.
    """
    records = records_in(results)
    settings = settings_of(records)
    if not any(QAT in s.runs for s in settings):
        raise ValueError(f"{results}: found {len(records)} results and none of plain QAT; run `make results` first.")
    document.parent.mkdir(parents=True, exist_ok=True)
    gains, sizes = (document.with_name(f"{document.stem}_{name}.svg") for name in ("gains", "images"))
    drawn = draw_gains([(s.name, s.gain(SAQ)) for s in settings if s.is_default], gains)
    studies = size_studies(settings)
    drawn_sizes = bool(studies) and draw_sizes(
        [(f"{s[0].name}", [(training_images(x), x.gain(SAQ)) for x in s]) for s in studies], sizes
    )
    parts = [
        "# Does SAQ beat plain quantization-aware training?\n\nWritten by `python -m benchmarks.accuracy.page` from "
        f"the runs in `{results.as_posix()}`, each of which names its command; no figure is typed by hand. "
        "How each comes about is at the end.\n",
        claims([s for s in settings if s.is_default]),
        f"![Gain of SAQ over plain QAT]({gains.name})\n" if drawn else "",
        cheaper([s for s in settings if s.is_default]),
        *(table(s) for s in settings if s.is_default),
        size_table(studies),
        f"![Gain by number of training images]({sizes.name})\n" if drawn_sizes else "",
        how(records),
        chosen(records),
        versions(records),
    ]
    document.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def how(records: Sequence[dict[str, Any]]) -> str:
    """The tasks that were run, and what all runs share."""
    present = {r["arguments"]["task"] for r in records}
    lines = [
        "## How",
        "",
        "LSQ, weights and activations with the same bits, 8 bits in the first layer and the head, calibrated on up to "
        "256 training images. Learning rate along a cosine to zero, a tenth of it for scales. All methods of a seed "
        "start from the same float model and see the same images in the same order. The learning rate is chosen with "
        "plain QAT and used by all, the radius at that rate; both on validation images, with seeds that are not used "
        f"again; that of `{QUARTER}` where [cheaper.md](cheaper.md) chose it. A float model that all "
        "seeds share is not the same to the last bit on another machine; where seeds "
        "were added later, they have another one. Passes: forward and backward passes over those of QAT; time: "
        "processor time of training over that of QAT, on seeds that both ran with one commit and so on one machine, "
        "beside whatever else ran there. "
        "Distilled: half of the loss is the Kullback-Leibler divergence from the answers of the float model, at "
        "temperature 2.",
        "",
    ]
    for name, task in TASKS.items():
        if name in present:
            a = next(r["arguments"] for r in records if r["arguments"]["task"] == name)
            tested = "all" if task.test_images is None else f"{task.test_images}"
            decay = f"weight decay {a['weight_decay']:g}"
            lines.append(
                f"- **{task.title}**: {task.description} {task.steps} steps of {a['batch_size']} images, "
                f"{'AdamW' if a['optimizer'] == 'adamw' else 'SGD with momentum 0.9'}, {decay}; {tested} test images. "
                + how_chosen(task)
            )
    return "\n".join(lines) + "\n"


def how_chosen(task: Task) -> str:
    if task.trials == 1:
        return "Learning rates and the radius are those that other trials chose ([protocol.md](protocol.md))."
    if task.trials:
        at = "" if task.tuned_at is None else f", at {task.tuned_at} bits for all"
        return (
            f"Here every method has a learning rate and a radius of its own, the best of {task.trials} trials "
            f"each{at}; cases 1 and 2 and the last layers take the learning rate of case 3 and try radii alone "
            "([protocol.md](protocol.md))."
        )
    return "Cases 1 and 2 use the radius of case 3." if task.shared_radius else "Each case has its own radius."


def chosen(records: Sequence[dict[str, Any]]) -> str:
    """Validation accuracy of every learning rate and radius that was tried."""
    scores: dict[tuple[str, int, str, float, float], list[float]] = {}
    for record in records:
        a = record["arguments"]
        if a["kind"] == "trial":
            key = (a["task"], a["bits"], a["method"], a["lr"], a["saq"]["rho"] if a["saq"] else 0.0)
            scores.setdefault(key, []).append(100 * record["outcome"]["validation"])
    if not scores:
        return ""
    lines = [
        "## Learning rates and radii that were tried",
        "",
        "Mean top-1 on the validation images.",
        "",
        *head("task", "bits", "method", "learning rate", "radius", "validation %", "seeds"),
    ]
    order, methods = list(TASKS), list(METHODS)
    rank = sorted(scores, key=lambda k: (order.index(k[0]), -k[1], methods.index(k[2]), k[3], k[4]))
    for key in rank:
        name, bits, method, lr, rho = key
        radius = f"{rho:g}" if rho else "-"
        values = scores[key]
        lines.append(row(name, str(bits), method, f"{lr:g}", radius, f"{mean(values):.2f}", str(len(values))))
    return "\n".join(lines) + "\n"


def versions(records: Sequence[dict[str, Any]]) -> str:
    devices = sorted({r["arguments"]["device"] for r in records})
    seconds = sum(r["outcome"]["cpu_seconds"] for r in records)
    return (
        f"## Versions\n\n{'; '.join(versions_of(records))}. Device: {', '.join(devices)}. {len(records)} runs; "
        f"training them took {seconds / 60:.0f} minutes of one processor.\n"
    )


if __name__ == "__main__":
    main()

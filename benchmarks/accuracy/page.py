#!/usr/bin/env python
"""docs/results.md and its plots, made of the stored runs of `accuracy.py` and of nothing else.

python -m benchmarks.accuracy.page [results] [document]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..shared.paired import Difference, difference
from .methods import CASES, LONGER, METHODS, QAT, SAQ
from .plots import draw_gains, draw_sizes
from .tasks import TASKS

LOW_BITS = 3


@dataclass
class Setting:
    """All runs of one task at one number of bits and images per class.

    Attributes:
        runs: Records by method and seed.
    """

    task: str
    bits: int
    images_per_class: int | None
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{TASKS[self.task].title}, W{self.bits}A{self.bits}"

    @property
    def is_default(self) -> bool:
        return self.images_per_class == TASKS[self.task].images_per_class

    def test(self, method: str) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return {seed: 100 * run["outcome"]["test"] for seed, run in self.runs.get(method, {}).items()}

    def gain(self, method: str, over: str = QAT) -> Difference | None:
        """Raises `ValueError` if runs of a seed that are to be compared start from different float models."""
        these, those = (self.runs.get(name, {}) for name in (method, over))
        for seed in sorted(set(these) & set(those)):
            started = [run["outcome"]["float_model"] for run in (these[seed], those[seed])]
            if started[0] != started[1]:
                raise ValueError(
                    f"{self.name}, seed {seed}: {method!r} starts from float model {started[0]}, {over!r} from "
                    f"{started[1]}; expected the same one. Remove the runs of one of them and run accuracy.py again."
                )
        return difference(self.test(method), self.test(over))

    def float_tests(self) -> dict[str, float]:
        """Test accuracy in percent of every float model that runs start from."""
        runs = [run for by_seed in self.runs.values() for run in by_seed.values()]
        return {run["outcome"]["float_model"]: 100 * run["outcome"]["float_test"] for run in runs}


def main(argv: Sequence[str]) -> None:
    results = Path(argv[0] if argv else "benchmarks/results/accuracy")
    document = Path(argv[1] if len(argv) > 1 else "docs/results.md")
    write_page(results, document)


def write_page(results: Path, document: Path) -> None:
    """Write the page to `document`, and the plots beside it.

    Raises:
        ValueError: If there is no run of plain QAT in `results`.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    settings = settings_of(records)
    if not any(QAT in s.runs for s in settings):
        raise ValueError(f"{results}: found {len(records)} results and none of plain QAT; run accuracy.py first.")
    document.parent.mkdir(parents=True, exist_ok=True)
    gains, sizes = (document.with_name(f"{document.stem}_{name}.svg") for name in ("gains", "images"))
    drawn = draw_gains([(s.name, s.gain(SAQ)) for s in settings if s.is_default], gains)
    studies = size_studies(settings)
    drawn_sizes = bool(studies) and draw_sizes(
        [(f"{s[0].name}", [(training_images(x), x.gain(SAQ)) for x in s]) for s in studies], sizes
    )
    parts = [
        "# Does SAQ beat plain quantization-aware training?\n\nWritten by `make results` from the runs in "
        f"`{results.as_posix()}`; no figure is typed by hand. How each comes about is at the end.\n",
        claims([s for s in settings if s.is_default]),
        f"![Gain of SAQ over plain QAT]({gains.name})\n" if drawn else "",
        *(table(s) for s in settings if s.is_default),
        size_table(studies),
        f"![Gain by number of training images]({sizes.name})\n" if drawn_sizes else "",
        how(records),
        chosen(records),
        versions(records),
    ]
    document.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def settings_of(records: Sequence[dict[str, Any]]) -> list[Setting]:
    """In the order of the tasks, most bits first, fewest images first."""
    found: dict[tuple[str, int, int | None], Setting] = {}
    for record in records:
        a = record["arguments"]
        if a["kind"] == "run":
            key = (a["task"], a["bits"], a["images_per_class"])
            setting = found.setdefault(key, Setting(*key))
            setting.runs.setdefault(a["method"], {})[a["seed"]] = record
    order = list(TASKS)
    return sorted(found.values(), key=lambda s: (order.index(s.task), -s.bits, training_images(s)))


def training_images(setting: Setting) -> int:
    """Of one seed."""
    runs = next(iter(setting.runs.values()))
    return next(iter(runs.values()))["outcome"]["training_images"]


def claims(settings: Sequence[Setting]) -> str:
    """Every comparison that the method is to be judged by, and what its interval allows to say."""
    lines = [
        "## In short",
        "",
        "SAQ (case 3) minus each of the others, mean over seeds of the paired difference in top-1, in points, with "
        "its 95 % interval. **Bold**: the interval does not contain zero.",
        "",
        "| task | seeds | minus QAT, same steps | minus QAT, twice the steps | minus case 2 | minus case 1 |",
        "|---|---|---|---|---|---|",
    ]
    for s in settings:
        found = [s.gain(SAQ, over) for over in (QAT, LONGER, "case 2", "case 1")]
        cells = ["-" if d is None else f"**{d}**" if d.sign else str(d) for d in found]
        lines.append("| " + " | ".join([s.name, str(len(s.runs.get(SAQ, {}))), *cells]) + " |")
    lines += ["", *(f"- {sentence}" for sentence in sentences(settings))]
    return "\n".join(lines) + "\n"


def sentences(settings: Sequence[Setting]) -> list[str]:
    """What the table says, counted."""

    def count(over: str, among: Sequence[Setting]) -> str:
        found = [d for s in among if (d := s.gain(SAQ, over)) is not None]
        if not found:
            return "no comparison was run"
        higher = sum(d.mean > 0 for d in found)
        surely, surely_not = (sum(d.sign == sign for d in found) for sign in (1, -1))
        return (
            f"higher in mean in {higher} of {len(found)} settings, with an interval above zero in {surely} and below "
            f"zero in {surely_not}"
        )

    low = [s for s in settings if s.bits <= LOW_BITS]
    tasks = {s.task for s in low if (d := s.gain(SAQ)) is not None and d.mean > 0}
    said = [
        f"SAQ against QAT with the same number of steps: {count(QAT, settings)}; at {LOW_BITS} bits or fewer it is "
        f"higher in mean in some setting of {len(tasks)} of {len({s.task for s in low})} tasks.",
        f"SAQ against QAT with twice the steps, which costs the same: {count(LONGER, settings)}.",
    ]
    for case in CASES:
        said.append(f"SAQ against {case}: {count(case, settings)}.")
    intervals = sum(d is not None for s in settings for d in (s.gain(SAQ, m) for m in (QAT, LONGER, *CASES)))
    said.append(f"{intervals} intervals are shown, uncorrected: one in twenty misses its mean by chance alone.")
    return said


def table(setting: Setting) -> str:
    """Of one setting: every method, its cost, accuracy and gain."""
    lines = [
        f"## {setting.name}",
        "",
        f"{training_images(setting)} training images; {floats(setting)}",
        "",
        "| method | passes | radius | seeds | top-1 % | gain over QAT |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        test = setting.test(method)
        if not test:
            continue
        saq = next(iter(setting.runs[method].values()))["arguments"]["saq"]
        spread = f" ± {stdev(test.values()):.2f}" if len(test) > 1 else ""
        gain = setting.gain(method) if method != QAT else None
        cells = [
            method,
            f"{METHODS[method].passes:.2f}",
            f"{saq['rho']:g}" if saq else "-",
            str(len(test)),
            f"{mean(test.values()):.2f}{spread}",
            "-" if gain is None else f"**{gain}**" if gain.sign else str(gain),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def floats(setting: Setting) -> str:
    """How good the float models are."""
    found = sorted(setting.float_tests().values())
    if TASKS[setting.task].float_per_seed:
        return f"the float model has {mean(found):.2f} % in the mean over seeds."
    if len(found) == 1:
        return f"the float model has {found[0]:.2f} %."
    each = ", ".join(f"{value:.2f} %" for value in found)
    return f"{len(found)} float models, each trained on another machine and with seeds of its own: {each}."


def size_studies(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that differ only in the number of images, where there are several."""
    groups: dict[tuple[str, int], list[Setting]] = {}
    for s in settings:
        groups.setdefault((s.task, s.bits), []).append(s)
    return [group for group in groups.values() if len(group) > 1]


def size_table(studies: Sequence[Sequence[Setting]]) -> str:
    if not studies:
        return ""
    lines = [
        "## How the gain depends on the number of images",
        "",
        "The same number of steps and batch size throughout; learning rate and radius are those that were chosen at "
        "the task's own number of images.",
        "",
        "| task | training images | float % | QAT % | SAQ % | seeds | SAQ minus QAT |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        for s in study:
            gain = s.gain(SAQ)
            if gain is None:
                continue
            both = sorted(set(s.test(QAT)) & set(s.test(SAQ)))
            floats = [100 * s.runs[QAT][seed]["outcome"]["float_test"] for seed in both]
            means = [mean(s.test(m)[seed] for seed in both) for m in (QAT, SAQ)]
            cells = [s.name, str(training_images(s)), f"{mean(floats):.2f}", *(f"{m:.2f}" for m in means)]
            lines.append("| " + " | ".join([*cells, str(len(both)), f"**{gain}**" if gain.sign else str(gain)]) + " |")
    return "\n".join(lines) + "\n"


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
        "again. A float model that all seeds share is not the same to the last bit on another machine; where seeds "
        "were added later, they have another one. Passes: forward and backward passes over those of QAT. Distilled: "
        "half of the loss is the Kullback-Leibler divergence from the answers of the float model, at temperature 2.",
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
                + (
                    "Cases 1 and 2 use the radius of case 3."
                    if task.shared_radius
                    else "Each case has its own radius."
                )
            )
    return "\n".join(lines) + "\n"


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
        "| task | bits | method | learning rate | radius | validation % | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    order, methods = list(TASKS), list(METHODS)
    rank = sorted(scores, key=lambda k: (order.index(k[0]), -k[1], methods.index(k[2]), k[3], k[4]))
    for key in rank:
        name, bits, method, lr, rho = key
        radius = f"{rho:g}" if method != QAT else "-"
        values = scores[key]
        lines.append(f"| {name} | {bits} | {method} | {lr:g} | {radius} | {mean(values):.2f} | {len(values)} |")
    return "\n".join(lines) + "\n"


def versions(records: Sequence[dict[str, Any]]) -> str:
    found = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records})
    devices = sorted({r["arguments"]["device"] for r in records})
    seconds = sum(r["outcome"]["cpu_seconds"] for r in records)
    return (
        f"## Versions\n\n{'; '.join(found)}. Device: {', '.join(devices)}. {len(records)} runs; training them took "
        f"{seconds / 60:.0f} minutes of one processor.\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

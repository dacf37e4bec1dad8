"""Tables of docs/results.md: what SAQ gains over each of the others, and every method of each setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from ..shared.markdown import head, row
from ..shared.paired import Difference, average
from .methods import BALANCED, CASES, ECHO, HEAD, INTERVAL, LATE, LONGER, MATCHED, METHODS, QAT, QUARTER, SAQ, SIXTH
from .settings import Setting, training_images
from .tasks import TASKS

LOW_BITS = 3
RIVALS = (QAT, LONGER, *reversed(CASES))
CHEAPER = (
    BALANCED,
    MATCHED,
    SIXTH,
    LATE,
    QUARTER,
    HEAD,
    INTERVAL,
    ECHO,
    "qat, echoed batches",
    "qat, clean statistics",
)
"""Ways that are to keep the gain of two full passes for less, and their controls."""
LEAST_GAIN = 1.0
"""Points that two full passes must gain for a share of it to be given."""


def claims(settings: Sequence[Setting]) -> str:
    """Every comparison that the method is to be judged by, and what its interval allows to say."""
    lines = [
        "## In short",
        "",
        "SAQ (case 3) minus each of the others, mean over seeds of the paired difference in top-1, in points, with "
        "its 95 % interval. **Bold**: the interval does not contain zero. A number behind it: so many "
        "seeds have both, where that is not all of SAQ's.",
        "",
        *head("task", "seeds", "minus QAT, same steps", "minus QAT, twice the steps", "minus case 2", "minus case 1"),
    ]
    for s in settings:
        found = [s.gain(SAQ, over) for over in RIVALS]
        seeds = len(s.runs.get(SAQ, {}))
        lines.append(row(s.name, str(seeds), *(shown(gain) + fewer(gain, seeds) for gain in found)))
    for title, among in (("all settings", settings), ("settings that no preset was chosen on", reported(settings))):
        lines.append(averages(title, among))
    lines += ["", *(f"- {sentence}" for sentence in sentences(settings))]
    return "\n".join(lines) + "\n"


def reported(settings: Sequence[Setting]) -> list[Setting]:
    return [s for s in settings if TASKS[s.task].reported]


def averages(title: str, settings: Sequence[Setting]) -> str:
    """A row: the plain average of each column."""
    cells = []
    for over in RIVALS:
        found = of_seeds(s.gain(SAQ, over) for s in settings)
        cells.append(f"{shown(average(found))} ({len(found)} rows)" if len(found) > 1 else "-")
    return row(f"average over {title}", "", *cells)


def of_seeds(gains: Iterable[Difference | None]) -> list[Difference]:
    """Those that have an interval."""
    return [gain for gain in gains if gain is not None and len(gain.values) > 1]


def cheaper(settings: Sequence[Setting]) -> str:
    """What cheaper ways keep of the gain of two full passes, setting by setting and in the average of those that no
    preset was chosen on; "" if none was run."""
    lines = [
        "## What cheaper ways keep",
        "",
        "Gains over plain QAT in points, of the way and of SAQ with two full passes, on the seeds that both have. "
        "Kept is the one over the other. It is not given where SAQ itself gains less than a point, as that divides by "
        "noise. **Bold** settings are those that no preset was chosen on, and averages are over them alone. On models "
        "of few layers the last eighth and the head can be the same layers. Measured times are in [cost.md](cost.md).",
        "",
        *head("way", "passes", "setting", "seeds", "its gain", "gain of two passes", "kept"),
    ]
    rows = []
    for method in CHEAPER:
        pairs = [
            (s, own, full)
            for s in settings
            if (own := s.gain(method, beside=SAQ)) is not None and (full := s.gain(SAQ, beside=method)) is not None
        ]
        for s, own, full in pairs:
            name = f"**{s.name}**" if TASKS[s.task].reported else s.name
            rows.append(row(*way(method), name, str(len(own.values)), shown(own), shown(full), kept(own, full)))
        found = [(own, full) for s, own, full in pairs if TASKS[s.task].reported and len(own.values) > 1]
        if len(found) > 1:
            own, full = (average([pair[side] for pair in found]) for side in (0, 1))
            title = f"average over {len(found)} settings"
            rows.append(row(*way(method), f"**{title}**", "", shown(own), shown(full), kept(own, full)))
    return "\n".join([*lines, *rows]) + "\n" if rows else ""


def way(method: str) -> tuple[str, str]:
    return method, f"{METHODS[method].passes:.2f}"


def kept(own: Difference, full: Difference) -> str:
    """The share of a gain, where there is one to have a share of."""
    if full.mean < LEAST_GAIN:
        return "-"
    return f"{own.mean / full.mean:.0%}" if own.mean > 0 else "nothing"


def shown(gain: Difference | None) -> str:
    """A cell: bold if the whole interval lies on one side of zero, a dash if there is no comparison."""
    if gain is None:
        return "-"
    return f"**{gain}**" if gain.sign else str(gain)


def fewer(gain: Difference | None, seeds: int) -> str:
    """What a cell says of its seeds: nothing where they are those of its row."""
    return "" if gain is None or len(gain.values) == seeds else f" ({len(gain.values)})"


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
    intervals = sum(s.gain(SAQ, over) is not None for s in settings for over in RIVALS)
    said.append(f"{intervals} intervals are shown, uncorrected: one in twenty misses its mean by chance alone.")
    return said


def table(setting: Setting) -> str:
    """Of one setting: every method, its cost, accuracy and gain.

    Where every method has a learning rate of its own, that rate, and cost as it was measured: passes over those of
    plain training, processor time over that of QAT.
    """
    measured = TASKS[setting.task].trials > 0
    more = ["time", "learning rate"] if measured else []
    lines = [
        f"## {setting.name}",
        "",
        f"{training_images(setting)} training images; {floats(setting)}",
        "",
        *head("method", "passes", *more, "radius", "seeds", "top-1 %", "gain over QAT"),
    ]
    for method in METHODS:
        test = setting.test(method)
        if not test:
            continue
        runs = list(setting.runs[method].values())
        saq = runs[0]["arguments"]["saq"]
        passes = METHODS[method].passes
        more = []
        if measured:
            if (saq or {}).get("ascent_depth", 1) == 1:  # what runs once for two passes was counted twice
                passes = METHODS[method].length * mean(run["outcome"]["passes"] for run in runs)
            time = setting.time(method)
            more = ["-" if time is None else f"{time:.2f}", f"{runs[0]['arguments']['lr']:g}"]
        spread = f" ± {stdev(test.values()):.2f}" if len(test) > 1 else ""
        gain = setting.gain(method) if method != QAT else None
        cells = [
            method,
            f"{passes:.2f}",
            *more,
            f"{saq['rho']:g}" if saq else "-",
            str(len(test)),
            f"{mean(test.values()):.2f}{spread}",
            shown(gain),
        ]
        lines.append(row(*cells))
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


def size_table(studies: Sequence[Sequence[Setting]]) -> str:
    if not studies:
        return ""
    lines = [
        "## How the gain depends on the number of images",
        "",
        "The same number of steps and batch size throughout; learning rate and radius are those that were chosen at "
        "the task's own number of images.",
        "",
        *head("task", "training images", "float %", "QAT %", "SAQ %", "seeds", "SAQ minus QAT"),
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
            lines.append(row(*cells, str(len(both)), shown(gain)))
    return "\n".join(lines) + "\n"

"""Train a small part of docs/results.md anew and see whether it lands where the stored runs are.

    python -m benchmarks.accuracy.quick     # what `make results-quick` runs: QAT and SAQ on digits, 5 seeds

A ViT at 2 bits and a CNN with batch norms at 3. Needs no data but what scikit-learn ships. Exits with 1 if a mean lies
further from the stored one than two of the stored standard deviations over seeds, or the mean gain outside the stored
95 % interval.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import records_in
from .arguments import AccuracyArguments
from .methods import QAT, SAQ
from .settings import Setting, settings_of
from .tasks import TASKS
from .training import train_one, workers


@dataclass
class QuickArguments:
    """Which stored runs to repeat."""

    settings: list[str] = field(
        default_factory=lambda: ["digits:2", "digits-cnn:3"],
        metadata={"help": "Tasks of the sweep and bits of weights and activations, task:bits."},
    )
    seeds: list[int] = field(default_factory=lambda: list(range(5)), metadata={"help": "At least two."})
    processes: int = field(default=2, metadata={"help": "Runs at the same time, each with one thread."})
    results: str = field(default=f"{RESULTS}/accuracy", metadata={"help": "The stored runs."})

    def __post_init__(self) -> None:
        for setting in self.settings:
            task, _, bits = setting.rpartition(":")
            if task not in TASKS or not bits.isdecimal():
                raise ValueError(f"--settings {setting}: expected a task and its bits, such as digits:2.")


def main(argv: Sequence[str] | None = None) -> int:
    args, _ = parsed(QuickArguments, argv, "benchmarks.accuracy.quick", __doc__)
    stored = []
    for setting in args.settings:  # before anything is trained
        task, _, bits = setting.rpartition(":")
        stored.append(stored_setting(args, task, int(bits)))
    with workers(args.processes) as pool:
        return max(repeated(old, args.seeds, pool) for old in stored)


def repeated(old: Setting, seeds: Sequence[int], pool: Executor) -> int:
    """Train everything in `old` anew and print both; 0 if they agree, else 1."""
    jobs = [old.runs[method][seed]["arguments"] for seed in seeds for method in (QAT, SAQ)]
    paths = AccuracyArguments().paths()
    waiting = [pool.submit(train_one, job, paths) for job in jobs]
    outcomes = [future.result() for future in waiting]
    new = Setting(old.task, old.bits, old.images_per_class)
    for job, outcome in zip(jobs, outcomes, strict=True):
        new.runs.setdefault(job["method"], {})[job["seed"]] = {"arguments": job, "outcome": outcome}
    return compare(old, new)


def stored_setting(args: QuickArguments, task: str, bits: int) -> Setting:
    """Of the task's own number of images, with the asked seeds only."""
    for setting in settings_of(records_in(Path(args.results))):
        if (setting.task, setting.bits) == (task, bits) and setting.is_default:
            runs = {m: {s: r for s, r in setting.runs.get(m, {}).items() if s in args.seeds} for m in (QAT, SAQ)}
            missing = {m: sorted(set(args.seeds) - set(r)) for m, r in runs.items() if set(args.seeds) - set(r)}
            if missing:
                raise ValueError(
                    f"{args.results}: no stored runs of {missing} (method: seeds); run `make results` first."
                )
            return Setting(setting.task, setting.bits, setting.images_per_class, runs)
    raise ValueError(f"{args.results}: no stored runs of {task} at {bits} bits; run `make results` first.")


def compare(old: Setting, new: Setting) -> int:
    """Print both side by side; 0 if the new one is within the spread of the old one, else 1."""
    good = True
    print(f"{old.name}, seeds {sorted(old.runs[QAT])}")
    for method in (QAT, SAQ):
        before, now = old.test(method), new.test(method)
        spread = stdev(before.values())
        within = abs(mean(now.values()) - mean(before.values())) <= 2 * spread
        good &= within
        print(
            f"{method:<8} stored {mean(before.values()):.2f} ± {spread:.2f}   now {mean(now.values()):.2f}   "
            f"{sum(before[s] == now[s] for s in before)} of {len(before)} equal   {'ok' if within else 'OUTSIDE'}"
        )
    before_gain, now_gain = old.gain(SAQ), new.gain(SAQ)
    assert before_gain is not None and now_gain is not None
    within = abs(now_gain.mean - before_gain.mean) <= before_gain.half_width
    print(f"{'gain':<8} stored {before_gain}   now {now_gain}   {'ok' if within else 'OUTSIDE'}")
    return 0 if good and within else 1


if __name__ == "__main__":
    sys.exit(main())

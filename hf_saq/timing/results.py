"""Hold what a benchmark found, as a table that can be printed and as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..tables import text_table

BUSIER_THAN_TOLD = 1.2
"""More than this share of the processor time that its threads have means that a form runs on more of them."""


@dataclass(frozen=True)
class FormResult:
    """Says what a form is and how faithful it is.

    Attributes:
        name: Key of `FORMS`.
        about: What it is.
        file_bytes: Bytes of its weight files, or of its graph.
        same_top1: Images, or their pixels or queries, that it gives the class that the quantized model gives; scores
            that are NaN give none.
        difference: Root mean square of the differences of its logits to the quantized model's, as a share of that of
            those; NaN or infinite, and then `None` in `to_dict()`, if logits are.
    """

    name: str
    about: str
    file_bytes: int
    same_top1: int
    difference: float


@dataclass(frozen=True)
class Timing:
    """Says how fast a form is with one batch size and number of threads.

    Attributes:
        form: Key of `FORMS`.
        threads, batch: What it was run with.
        median, lower_quartile, upper_quartile, fastest: Seconds of a call by the clock that was asked for.
        ratio: Median over rounds of its median time over that of the reference in the same round.
        wall, cpu: Median seconds of a call by both clocks; the second counts all threads.
        memory_bytes: The most that the process had while it ran, beyond what it had before it loaded the form; `None`
            where the system does not say.
        calls: How many were timed.
    """

    form: str
    threads: int
    batch: int
    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    ratio: float
    wall: float
    cpu: float
    memory_bytes: int | None
    calls: int

    @property
    def is_busier_than_told(self) -> bool:
        """Tell whether the form took processor time on more threads than it was told to use."""
        return self.cpu > BUSIER_THAN_TOLD * self.threads * self.wall


@dataclass(frozen=True)
class BenchmarkResult:
    """Holds what was found; `print(result)` shows tables, `to_dict()` is JSON-plain.

    Attributes:
        model: Class of the model.
        bits: Bits of its layers, `W4A4` for example -> how many layers have them.
        images: What it was run on, and their shape.
        reference: The form that ratios are to.
        clock: `"wall"` or `"process"`.
        rounds: How often all forms took turns.
        machine: What it ran on.
        versions: Versions of the libraries.
        forms: One entry for each form that was measured.
        timings: One entry for each form, number of threads and batch size.
        skipped: Form -> why it was not measured.
        count: Predictions that were compared: one for each image, or for each of its pixels or queries.
    """

    model: str
    bits: dict[str, int]
    images: str
    reference: str
    clock: str
    rounds: int
    machine: dict[str, Any]
    versions: dict[str, str]
    forms: tuple[FormResult, ...]
    timings: tuple[Timing, ...]
    skipped: dict[str, str]
    count: int

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for form in found["forms"]:
            if not math.isfinite(form["difference"]):
                form["difference"] = None
        return found

    def __str__(self) -> str:
        flags = ", ".join(self.machine["integer_flags"]) or "not known"
        bits = ", ".join(f"{count} layers {name}" for name, count in self.bits.items())
        lines = [
            f"{self.model}: {bits}; {self.images}",
            f"{self.machine['cpu']}, {self.machine['cores']} cores, integer instructions: {flags}",
            f"{self.clock} clock, {self.rounds} rounds over all forms; ratios are to {self.reference}",
        ]
        for threads, batch in dict.fromkeys((timing.threads, timing.batch) for timing in self.timings):
            found = [timing for timing in self.timings if (timing.threads, timing.batch) == (threads, batch)]
            lines += ["", f"threads {threads}, batch {batch}", self._table(found)]
            lines += [
                f"{timing.form} kept {timing.cpu / timing.wall:.1f} cores busy although it was told to use {threads}."
                for timing in found
                if timing.is_busier_than_told
            ]
        lines += ["", *(f"{form} skipped: {reason}" for form, reason in self.skipped.items())]
        return "\n".join(lines).rstrip()

    def _table(self, timings: list[Timing]) -> str:
        by_name = {form.name: form for form in self.forms}
        rows = [("form", "ms", "quartiles", "ratio", "memory MB", "file MB", "same top-1", "logits differ by")]
        for timing in timings:
            form = by_name[timing.form]
            memory = "" if timing.memory_bytes is None else f"{timing.memory_bytes / 1e6:.0f}"
            rows.append(
                (
                    form.name,
                    f"{1000 * timing.median:.2f}",
                    f"{1000 * timing.lower_quartile:.2f} to {1000 * timing.upper_quartile:.2f}",
                    f"{timing.ratio:.2f}",
                    memory,
                    f"{form.file_bytes / 1e6:.2f}",
                    f"{form.same_top1} of {self.count}",
                    f"{form.difference:.1e}",
                )
            )
        return text_table(rows, right=range(1, 8))

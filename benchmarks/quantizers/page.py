"""docs/quantizers.md, made from the stored results of the sweep and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..shared.cifar_data import PADDING
from ..shared.cifar_training import CALIBRATION_BATCH, CALIBRATION_BATCHES
from ..shared.markdown import head, row
from ..shared.runs import records_in
from ..shared.training_loop import MOMENTUM, SCALE_LR_RATIO

MODULE = "benchmarks.quantizers.sweep"
"""The script that makes the results and the page."""
FLOAT = "float"
FLOAT_BITS = 32
STEADY = 0.05
"""Up to which relative change a range counts as not having moved."""

HEAD = """# Quantizers

Written by `python -m {module}` from the results in `{results}`; not edited by hand.

ResNet-20 on CIFAR-10, every quantizer at the same bits for weights and activations (first and last layer: 8), one step
size or clip per tensor, after the same short quantization-aware fine-tune from the same float model. The images are a
JPEG copy of CIFAR-10, so the figures are below those of the literature, and the fine-tune is {steps} steps rather
than hundreds of epochs: read the table as a comparison of quantizers, not as what each of them can reach.
"""


def page(results: Path) -> str:
    """The page on the results in the directory `results`.

    Raises:
        ValueError: If there is no adaptation or no run among them.
    """
    records = records_in(results)
    by_kind: dict[str, list[dict[str, Any]]] = {"adaptation": [], "trial": [], "run": [], "grids": []}
    for record in records:
        by_kind[record["arguments"]["kind"]].append(record)
    if not by_kind["run"] or len(by_kind["adaptation"]) != 1:
        raise ValueError(f"{results}: found {len(records)} results; expected one adaptation and at least one run.")
    runs = by_kind["run"]
    (adaptation,) = by_kind["adaptation"]
    parts = [
        HEAD.format(module=MODULE, results=results.as_posix(), steps=runs[0]["arguments"]["steps"]),
        table(runs),
        reading(runs, adaptation),
        protocol(runs, by_kind["trial"], adaptation),
        learning_rates(by_kind["trial"], runs),
        grids(by_kind["grids"]),
        ranges(runs),
        provenance(records),
    ]
    return "\n".join(parts)


def table(runs: list[dict[str, Any]]) -> str:
    """One row for each quantizer, one column for each number of bits: mean top-1 over seeds, after (before)."""
    widths = bits_of(runs)
    lines = head("quantizer", *(f"W{b}A{b}" for b in widths))
    for quantizer in quantizers_of(runs):
        cells = []
        for bits in widths:
            outcomes = [run["outcome"] for run in runs_of(runs, quantizer, bits)]
            cells.append(f"{percent(outcomes, 'test')} ({percent(outcomes, 'test_calibrated')})" if outcomes else "-")
        lines.append(row(quantizer, *cells))
    return "\n".join(lines) + "\n"


def reading(runs: list[dict[str, Any]], adaptation: dict[str, Any]) -> str:
    arguments, outcome = adaptation["arguments"], adaptation["outcome"]
    images = runs[0]["arguments"]["test_images"]
    accuracies = [run["outcome"]["test"] for run in runs]
    error = max(math.sqrt(a * (1 - a) / images) for a in accuracies)
    lines = [
        f"Top-1 on the first {images:,} test images after the fine-tune, in percent; in brackets, what the calibrated "
        f"model had on the first {runs[0]['arguments']['calibrated_images']:,} of them before it. "
        f"Seeds: {', '.join(map(str, seeds_of(runs)))}. One standard error of such a figure is at most "
        f"{100 * error:.1f} points, and differences between seeds come on top.",
        "",
        f"The float model has {outcome['test_before']:.2%} on all {arguments['test_images']:,} as it comes and "
        f"{outcome['test_after']:.2%} after its adaptation to them.",
    ]
    control = [run["outcome"]["test"] for run in runs if run["arguments"]["quantizer"] == FLOAT]
    if control:
        lines[-1] += (
            f" The same fine-tune that the quantized models get takes it, without any quantizer, to "
            f"{mean(control):.2%}: that is what they are to be compared with."
        )
    return "\n".join(lines) + "\n"


def protocol(runs: list[dict[str, Any]], trials: list[dict[str, Any]], adaptation: dict[str, Any]) -> str:
    first, arguments = runs[0]["arguments"], adaptation["arguments"]
    lines = [
        "## What was done",
        "",
        f"1. Adaptation: {arguments['steps']} steps of {arguments['batch_size']} images, learning rate "
        f"{arguments['lr']:g} (not tuned), from the published float weights.",
        '2. `quantize` with the defaults (per tensor, `scale_init="mse"`, 8-bit first and last layer), `calibrate` on '
        f"{CALIBRATION_BATCHES * CALIBRATION_BATCH} training images.",
        f"3. Fine-tune: {first['steps']} steps of {first['batch_size']} images, plain quantization-aware training "
        "(no perturbation).",
        "",
        f"Both train with SGD, momentum {MOMENTUM}, a cosine from the learning rate to zero, weight decay "
        f"{first['weight_decay']:g} on weights alone, images mirrored and shifted by up to {PADDING} pixels, "
        "normalization layers in training mode. Step sizes, clips and offsets have "
        f"{SCALE_LR_RATIO:g} times the learning rate and no decay (`hf_saq.parameter_groups`). Models with one seed "
        "see the same images in the same order.",
    ]
    if trials:
        trial = trials[0]["arguments"]
        lines += [
            "",
            "Each quantizer's learning rate is the smallest within one standard error of the best in accuracy on "
            f"{arguments['validation_images']:,} training images that no model here is trained on, after "
            f"{trial['steps']} steps at the lowest number of bits; its other bits use the same rate. In the committed "
            "results the rule was the plain best at first; it was changed when LSQ+ got its rate by seven images at 2 "
            "bits and fell well behind LSQ on test images at 4 bits. Beyond that, test images chose nothing. The "
            "published weights have seen the held-out images before (uncompressed), so these figures are no estimate "
            "of anything, but they compare learning rates.",
        ]
    return "\n".join(lines) + "\n"


def learning_rates(trials: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Validation accuracy of each quantizer and candidate, the chosen one in bold."""
    if not trials:
        return ""
    rates = sorted({trial["arguments"]["lr"] for trial in trials})
    lines = ["## Learning rates", "", "Top-1 on the held-out training images, in percent; chosen: bold.", ""]
    lines += head("quantizer", *(f"{rate:g}" for rate in rates))
    chosen = {run["arguments"]["quantizer"]: run["arguments"]["lr"] for run in runs}
    for quantizer in [*quantizers_of(trials), FLOAT]:
        scores = {
            trial["arguments"]["lr"]: f"{100 * trial['outcome']['validation']:.1f}"
            for trial in trials
            if trial["arguments"]["quantizer"] == quantizer
        }
        cells = [f"**{scores[r]}**" if r == chosen.get(quantizer) else scores.get(r, "-") for r in rates if scores]
        lines.append(row(quantizer, *cells))
    at_edge = [quantizer for quantizer, rate in sorted(chosen.items()) if rate == rates[0]]
    if at_edge:
        lines += ["", f"{', '.join(at_edge)}: the smallest rate that was tried; smaller ones may be better still."]
    return "\n".join(lines) + "\n"


SAID_OF_COMMITS = "the commit is what the process was started from, `-dirty` with changes to it."

GRIDS = """## The first grids of the weights

`||Q(w) - w||^2 / ||w||^2` of the adapted float weights, median over layers, and in brackets the share of weights on
the two outermost levels. LSQ and LIQ choose their clipping point; LSQ's levels include zero and reach further down
than up, LIQ's are symmetric without zero. DoReFa, whose weights PACT uses, ties the outermost levels to the largest
weight of the tensor, which leaves them nearly unused: at 2 bits about a sign and one magnitude remain.

"""


def grids(records: list[dict[str, Any]]) -> str:
    """How well the first grid of each quantizer fits the weights."""
    if not records:
        return ""
    (record,) = records
    widths = record["arguments"]["bits"]
    lines = head("quantizer", *(f"{b} bits" for b in widths))
    for quantizer in sorted(record["arguments"]["quantizers"]):
        found = [record["outcome"][f"{quantizer}-{bits}"] for bits in widths]
        cells = [f"{entry['error']:.3f} ({entry['outermost']:.1%})" for entry in found]
        lines.append(row(quantizer, *cells))
    return GRIDS + "\n".join(lines) + "\n"


def ranges(runs: list[dict[str, Any]]) -> str:
    """How far the fine-tune moved each quantizer's step sizes or clips: median over layers, last over first."""
    rows = []
    for quantizer in quantizers_of(runs):
        for bits in bits_of(runs):
            learned: dict[str, list[float]] = {"weight": [], "activation": []}
            own = runs_of(runs, quantizer, bits)
            for name, (first, last) in (item for run in own for item in run["outcome"]["learned_values"].items()):
                role = "weight" if ".weight_quantizer." in name else "activation"
                if not name.endswith(".offset"):
                    learned[role].append(last / first)
            if learned["weight"]:
                cells = (f"{min(v):.2f} {median(v):.2f} {max(v):.2f}" for v in learned.values())
                loss = mean(run["outcome"]["training_loss"] for run in own)
                rows.append(row(quantizer, str(bits), *cells, f"{loss:.2f}"))
    steady = [abs(last / first - 1) < STEADY for first, last in _scales(runs) if first != last]
    lines = [
        "## What the fine-tune did to the ranges",
        "",
        "Step size or clip after the fine-tune over its first value: smallest, median, largest of the layers. Last "
        f"column: mean training loss of the last steps. Of {len(steady):,} that moved at all, {sum(steady):,} ended "
        f"within {STEADY:.0%} of where they started: where that is nearly all of them, the table compares first grids "
        "and how weights learn on them, rather than how ranges learn.",
        "",
        *head("quantizer", "bits", "weights", "activations", "loss"),
    ]
    return "\n".join([*lines, *rows]) + "\n" if rows else ""


def _scales(runs: Iterable[dict[str, Any]]) -> Iterator[list[float]]:
    """First and last value of every step size and clip."""
    for run in runs:
        yield from (pair for name, pair in run["outcome"]["learned_values"].items() if not name.endswith(".offset"))


def provenance(records: list[dict[str, Any]]) -> str:
    seen: dict[str, set[str]] = {}
    for library, version in (pair for record in records for pair in record["versions"].items()):
        seen.setdefault(library, set()).add(version)
    versions = ", ".join(f"{library} {' and '.join(sorted(found))}" for library, found in seen.items())
    minutes = sum(record["seconds"] for record in records) / 60
    return (
        f"## Versions\n\n{versions}; {SAID_OF_COMMITS}\nAll runs together took {minutes:.0f} minutes, one thread on a "
        "machine with other work.\n"
    )


def bits_of(runs: Iterable[dict[str, Any]]) -> list[int]:
    return sorted({run["arguments"]["bits"] for run in runs} - {FLOAT_BITS}, reverse=True)


def quantizers_of(records: Iterable[dict[str, Any]]) -> list[str]:
    """Names in alphabetical order, without `float`."""
    return sorted({record["arguments"]["quantizer"] for record in records} - {FLOAT})


def seeds_of(runs: Iterable[dict[str, Any]]) -> list[int]:
    return sorted({run["arguments"]["seed"] for run in runs})


def runs_of(runs: Iterable[dict[str, Any]], quantizer: str, bits: int) -> list[dict[str, Any]]:
    return [run for run in runs if (run["arguments"]["quantizer"], run["arguments"]["bits"]) == (quantizer, bits)]


def percent(outcomes: list[dict[str, Any]], key: str) -> str:
    """The mean of `key`, 0 to 1, in percent; with its range if there are several."""
    values = [100 * outcome[key] for outcome in outcomes]
    spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"

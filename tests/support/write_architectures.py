"""Write docs/architectures.md from a run of the check over every architecture: `make architectures`."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import timm
import torch
import transformers
from architectures import ARCHITECTURES, Result, check

HEAD = """# Architectures

Written by `make architectures` with transformers {transformers}, timm {timm} and torch {torch}; not edited by hand.

Each row is a small random model of that architecture that was quantized to 4 bits (first layer and heads: 8),
calibrated, trained for two SAQ steps in which every quantized layer received a perturbation, stored in float and
in packed form, and loaded into fresh models with equal integer codes and equal logits. The sizes are not those of the
published models, so the numbers of layers are not either. An architecture may pass with layers in float: the notes say
how many and why, as `model.quantization_report` does for a model of yours. "Attentions" counts those whose products
`quantize_attention=True` quantized too, in a second run of the same check; where there is none it raises an error.

"""
LONGEST_REASON = 220


def page(results: list[Result]) -> str:
    versions = {"transformers": transformers.__version__, "timm": timm.__version__, "torch": torch.__version__}
    parts = [HEAD.format(**versions)]
    for library in ("transformers", "timm"):
        rows = [result for result in results if result.name.startswith(f"{library}/")]
        passed = sum(result.passed for result in rows)
        parts.append(f"## {library}: {passed} of {len(rows)} pass ({passed / len(rows):.1%})\n\n")
        parts.append(
            "| architecture | quantized | in float | attentions | result | notes |\n|---|---|---|---|---|---|\n"
        )
        parts += [_row(result) for result in rows]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _row(result: Result) -> str:
    notes = [f"{count} in float: {reason}" for reason, count in Counter(result.skipped).items()]
    if result.without_effect:
        notes.append(f"{result.without_effect} quantized layers have no part in the logits")
    reason = result.reason.replace("|", "/").replace("[", "(").replace("]", ")")
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON].rsplit(" ", 1)[0] + " ..."
    verdict = "passed" if result.passed else f"not supported: {reason}"
    name = result.name.split("/")[1]
    counts = f"{result.quantized} | {len(result.skipped)} | {result.attentions or '-'}"
    return f"| {name} | {counts} | {verdict} | {'; '.join(notes)} |\n"


def main(target: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of the libraries, about their own models
    results = []
    for architecture in ARCHITECTURES.values():
        results.append(check(architecture))
        print(architecture.name, "passed" if results[-1].passed else results[-1].reason, flush=True)
    target.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

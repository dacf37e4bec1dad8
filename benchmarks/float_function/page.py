"""docs/float_function.md, made of stored results and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from ..shared.markdown import row
from ..shared.runs import versions_of
from .conversions import CALIBRATION_BATCHES, CONVERSIONS, MODULE, RHO, file_name


def page(results: Path) -> str:
    """docs/float_function.md from the runs stored in `results`."""
    training = json.loads((results / "training.json").read_text(encoding="utf-8"))
    trained, args = training["outcome"], training["arguments"]
    rows = []
    for name in CONVERSIONS:
        found = json.loads((results / f"{file_name(name)}.json").read_text(encoding="utf-8"))["outcome"]
        rows.append(row(name, f"{found['agreement']:.1f}", f"{found['agreement with correct_biases']:.1f}"))
    moments = []
    for moment in ("QAT before", "QAT after", "SAQ before", "SAQ after"):
        moments.append(row(f"{moment} training", *(f"{share:.1f}" for share in trained[moment])))
    return f"""# What is left of the float function

Written by `python -m {MODULE}` from `{results.as_posix()}`; not edited by hand.

MobileNetV2 with ImageNet weights, converted and calibrated on {CALIBRATION_BATCHES} batches of {args["batch"]}
training images of Oxford Flowers-102, no training: share of {args["images"]} test images on which its first class, of
the 1,001 of ImageNet, is that of the float model, in percent. First layer and head at 8 bits.

| | agreement % | with `correct_biases` |
|---|---|---|
{chr(10).join(rows)}

The same checkpoint fine-tuned in float to the 102 flowers at {args["small_image_size"]} pixels
({args["float_epochs"]} epochs, top-1 {trained["float top-1"]:.1f} %), then W4A4 per channel, {args["epochs"]} epochs,
seed {args["seed"]}, SAQ with rho {RHO}, {args["images"]} test images:

| | agreement with float % | top-1 % |
|---|---|---|
{chr(10).join(moments)}

Versions: {"; ".join(versions_of([training]))}.
"""

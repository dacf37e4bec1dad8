"""Processor time of `hf_saq.analysis.sensitivity` as a multiple of one evaluation pass over the same images.

    python -m benchmarks.sensitivity_cost.measure     # ResNet-18, 128 images of 224 pixels, five candidates

The pass runs the same quantized model over the same batches, as an evaluation does, before and after the analysis;
the median counts. Processor time suffers less than the clock from what else the machine does. Weights are random and
images are noise: the cost depends on neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.analysis import sensitivity

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import Runs

CLASSES = 10
PASSES_ON_EACH_SIDE = 2


@dataclass
class CostArguments:
    """What is measured. A run that is stored already is not repeated."""

    model: str = field(default="resnet18", metadata={"help": "Name of a model of timm."})
    images: int = field(default=128, metadata={"help": "How many."})
    size: int = field(default=224, metadata={"help": "Their height and width in pixels."})
    batch: int = field(default=16, metadata={"help": "Images of a batch."})
    candidates: list[int] = field(default_factory=lambda: [2, 3, 4, 6, 8], metadata={"help": "Bits of the layers."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    results: str = field(default=f"{RESULTS}/sensitivity_cost", metadata={"help": "Where the record goes."})


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(CostArguments, argv, "benchmarks.sensitivity_cost.measure", __doc__)
    arguments = {key: value for key, value in asdict(args).items() if key != "results"}
    Runs(Path(args.results), command).once(args.model, arguments, lambda: measured(args))


def measured(args: CostArguments) -> dict[str, Any]:
    """Time both in turn on this machine."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=CLASSES)
    images = torch.randn(args.images, 3, args.size, args.size)
    labels = torch.randint(CLASSES, (args.images,))
    quantize(model, SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    calibrate(model, [images[: args.batch]]).eval()
    batches = list(zip(images.split(args.batch), labels.split(args.batch), strict=True))
    one_pass(model, batches[:1])  # what happens once
    passes = [one_pass(model, batches) for _ in range(PASSES_ON_EACH_SIDE)]
    start = time.process_time()
    found = sensitivity(model, batches, candidates=args.candidates, progress=False)
    seconds = time.process_time() - start
    passes += [one_pass(model, batches) for _ in range(PASSES_ON_EACH_SIDE)]
    return {
        "layers": len({entry.name for entry in found.entries}),
        "entries": len(found.entries),
        "cpu_seconds_of_a_pass": statistics.median(passes),
        "cpu_seconds_of_all_passes": passes,
        "cpu_seconds_of_the_analysis": seconds,
        "evaluation_passes": seconds / statistics.median(passes),
        "passes_that_it_counts": found.passes,
    }


@torch.no_grad()
def one_pass(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Evaluate the model once; returns the processor time in seconds."""
    start = time.process_time()
    for images, labels in batches:
        nn.functional.cross_entropy(model(images), labels)
    return time.process_time() - start


if __name__ == "__main__":
    main()

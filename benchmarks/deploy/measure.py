"""Measure the forms of some models and write docs/deploy.md's tables; runs that are stored are not done again.

python -m benchmarks.deploy.measure
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_saq.timing import benchmark
from hf_saq.timing.inputs import IMAGES

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import Runs
from .models import IMAGE_SIZE, MODELS, save_quantized
from .page import write_page


@dataclass
class Options:
    """What is measured."""

    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "some of the models alone"})
    rounds: int = field(default=8, metadata={"help": "how often all forms take turns"})
    clock: str = field(default="process", metadata={"help": "process, or wall on a quiet machine"})
    results: Path = field(default=Path(RESULTS) / "deploy", metadata={"help": "where outcomes are stored"})
    document: Path = field(default=Path("docs/deploy.md"), metadata={"help": "the page whose tables are written"})


def main(argv: Sequence[str] | None = None) -> None:
    options, command = parsed(Options, argv, "benchmarks.deploy.measure", __doc__)
    runs = Runs(options.results, command)
    for name in options.models:
        arguments = {"model": name, "rounds": options.rounds, "clock": options.clock, "images": IMAGES}
        runs.once(name, arguments, lambda name=name: measured(name, options.rounds, options.clock))  # type: ignore[misc]
    write_page(options.results, options.document)


def measured(name: str, rounds: int, clock: str) -> dict[str, Any]:
    """Measure all forms of the model `name`, one image at a time on one thread."""
    with tempfile.TemporaryDirectory() as directory:
        is_real = save_quantized(name, Path(directory))
        result = benchmark(
            directory,
            rounds=rounds,
            clock=clock,
            image_size=IMAGE_SIZE,
            target=MODELS[name].target,
            tell=lambda line: print(f"{name}: {line}", flush=True),
        )
    return {"real_weights": is_real, **result.to_dict()}


if __name__ == "__main__":
    main()

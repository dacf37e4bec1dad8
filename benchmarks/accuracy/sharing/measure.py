"""What quantizing once what several layers read (`share_inputs`) does to accuracy.

    python -m benchmarks.accuracy.sharing.measure --processes 2

Every stored run of the settings is trained again on this machine, with a scale for each layer and with a shared one,
from the same float model and with the learning rate and radius of the stored run, which had a scale for each. The
differences, seed by seed, go to benchmarks/results/shared_inputs.json and from there to docs/cost.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_saq import SAQQuantizationConfig, quantize

from ...shared.command_line import parsed
from ...shared.places import RESULTS
from ...shared.runs import versions
from ..arguments import AccuracyArguments
from ..methods import QAT, SAQ
from ..tasks import TASKS
from ..training import train_one, workers

WAYS = {"apart": {}, "shared": {"share_inputs": True}}


@dataclass
class SharingArguments:
    """What to train."""

    settings: list[str] = field(
        default_factory=lambda: ["cifar-vit:4", "cifar-vit:2"],
        metadata={"help": "Task and bits, with a colon between; transformers whose query, key and value are apart."},
    )
    methods: list[str] = field(default_factory=lambda: [QAT, SAQ], metadata={"help": "Some that have stored runs."})
    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Of images and order."})
    processes: int = field(default=1, metadata={"help": "Runs at the same time, each with one thread."})
    cache: str = field(default="outputs/accuracy", metadata={"help": "Decoded images and float models."})
    stored: str = field(default=f"{RESULTS}/accuracy", metadata={"help": "Runs whose settings are used."})
    output: str = field(default=f"{RESULTS}/shared_inputs.json", metadata={"help": "The file to write."})


def stored_arguments(directory: Path, setting: str, method: str) -> dict[str, Any]:
    """Arguments of a stored run of a setting, with the task's usual number of images."""
    task, _, bits = setting.partition(":")
    name = f"{task}-w{bits}-{method.replace(' ', '-')}-seed0.json"
    return json.loads((directory / name).read_text(encoding="utf-8"))["arguments"]


def check_that_inputs_are_shared(setting: str) -> None:
    """Raise `ValueError` if the model of a setting has nothing to share, so that both ways would be the same."""
    task = TASKS[setting.partition(":")[0]]
    model = quantize(task.build(), SAQQuantizationConfig(share_inputs=True))
    if not model.quantization_report.shared_inputs:  # type: ignore[union-attr]
        raise ValueError(f"{setting}: no layers of this model read the same tensor; expected query, key and value.")


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(SharingArguments, argv, "benchmarks.accuracy.sharing.measure", __doc__)
    paths = AccuracyArguments(cache=args.cache).paths()
    for setting in args.settings:
        check_that_inputs_are_shared(setting)
    cells = [(setting, method) for setting in args.settings for method in args.methods]
    found: list[dict[str, Any]] = []
    with workers(args.processes) as pool:
        jobs = {}
        for setting, method in cells:
            stored = stored_arguments(Path(args.stored), setting, method)
            for seed in args.seeds:
                for way, fields in WAYS.items():
                    given = {**stored, "seed": seed, "quantization": {**stored["quantization"], **fields}}
                    jobs[setting, method, seed, way] = pool.submit(train_one, given, paths)
        for setting, method in cells:
            accuracies = {
                way: [100 * jobs[setting, method, seed, way].result()["test"] for seed in args.seeds] for way in WAYS
            }
            found.append({"setting": setting, "method": method, "top1": accuracies})
            print(found[-1], flush=True)
    result = {"command": command, "seeds": args.seeds, "accuracies": found, "versions": versions()}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What an option of quantization that makes steps cheaper does to accuracy.

    python -m benchmarks.accuracy.options.measure --option share_inputs --processes 2
    python -m benchmarks.accuracy.options.measure --option learn_input_scale --settings cifar-resnet:3

Every stored run of the settings is trained again on this machine, without the option and with it, from the same float
model and with the learning rate and radius of the stored run, which was without. The differences, seed by seed, go to
benchmarks/results/options and from there to docs/cost.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_saq import SAQQuantizationConfig, quantize
from hf_saq.quantizers import Quantizer

from ...shared.command_line import parsed
from ...shared.places import RESULTS
from ...shared.runs import versions
from ..arguments import AccuracyArguments
from ..methods import QAT, SAQ
from ..tasks import TASKS
from ..training import train_one, workers


@dataclass(frozen=True)
class Option:
    """A field of `SAQQuantizationConfig`.

    Attributes:
        fields: What the runs with it have, and those without have not.
        settings: Tasks and bits that it is tried on by default.
        acts_on: Whether it changes anything in a model that is quantized with it.
    """

    fields: dict[str, Any]
    settings: tuple[str, ...]
    acts_on: Callable[[nn.Module], bool]


def keeps_a_scale(model: nn.Module) -> bool:
    return not all(m.learned for m in model.modules() if isinstance(m, Quantizer))


OPTIONS = {
    "share_inputs": Option(
        {"share_inputs": True},
        ("cifar-vit:4", "cifar-vit:2"),
        lambda model: bool(model.quantization_report.shared_inputs),  # type: ignore[union-attr]
    ),
    "learn_input_scale": Option({"learn_input_scale": False}, ("digits-cnn:3", "cifar-resnet:3"), keeps_a_scale),
}


@dataclass
class OptionArguments:
    """What to train."""

    option: str = field(metadata={"help": f"One of {list(OPTIONS)}."})
    settings: list[str] | None = field(
        default=None, metadata={"help": "Tasks and bits, with a colon between; default: those of the option."}
    )
    methods: list[str] = field(default_factory=lambda: [QAT, SAQ], metadata={"help": "Some that have stored runs."})
    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Of images and order."})
    first_last_bits: int = field(default=8, metadata={"help": "Of the first layer and the head; 0: as all others."})
    processes: int = field(default=1, metadata={"help": "Runs at the same time, each with one thread."})
    cache: str = field(default="outputs/accuracy", metadata={"help": "Decoded images and float models."})
    stored: str = field(default=f"{RESULTS}/accuracy", metadata={"help": "Runs whose settings are used."})
    output: str | None = field(
        default=None, metadata={"help": f"The file to write; default: {RESULTS}/options, named by the option."}
    )

    def __post_init__(self) -> None:
        if self.option not in OPTIONS:
            raise ValueError(f"--option {self.option}: unknown; expected one of {list(OPTIONS)}.")

    @property
    def file(self) -> Path:
        as_others = "" if self.first_last_bits else "_low_bits"
        return Path(self.output or f"{RESULTS}/options/{self.option}{as_others}.json")


def stored_arguments(directory: Path, setting: str, method: str) -> dict[str, Any]:
    """Arguments of a stored run of a setting, with the task's usual number of images."""
    task, _, bits = setting.partition(":")
    name = f"{task}-w{bits}-{method.replace(' ', '-')}-seed0.json"
    return json.loads((directory / name).read_text(encoding="utf-8"))["arguments"]


def check_that_it_acts(name: str, setting: str) -> None:
    """Raise `ValueError` if an option changes nothing in the model of a setting, so that both ways are the same."""
    option, task = OPTIONS[name], TASKS[setting.partition(":")[0]]
    if not option.acts_on(quantize(task.build(), SAQQuantizationConfig(**option.fields))):
        raise ValueError(f"{setting}: {option.fields} changes nothing in this model; expected one that it acts on.")


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(OptionArguments, argv, "benchmarks.accuracy.options.measure", __doc__)
    paths = AccuracyArguments(cache=args.cache).paths()
    option = OPTIONS[args.option]
    settings = args.settings or list(option.settings)
    for setting in settings:
        check_that_it_acts(args.option, setting)
    cells = [(setting, method) for setting in settings for method in args.methods]
    edges = {"first_last_bits": args.first_last_bits or None}
    found: list[dict[str, Any]] = []
    with workers(args.processes) as pool:
        jobs = {}
        for setting, method in cells:
            stored = stored_arguments(Path(args.stored), setting, method)
            for seed in args.seeds:
                for way, fields in (("without", {}), ("with", option.fields)):
                    quantization = {**stored["quantization"], **edges, **fields}
                    given = {**stored, "seed": seed, "quantization": quantization}
                    jobs[setting, method, seed, way] = pool.submit(train_one, given, paths)
        for setting, method in cells:
            accuracies = {
                way: [100 * jobs[setting, method, seed, way].result()["test"] for seed in args.seeds]
                for way in ("without", "with")
            }
            found.append({"setting": setting, "method": method, "top1": accuracies})
            print(found[-1], flush=True)
    result = {
        "command": command,
        "option": args.option,
        "fields": option.fields,
        "first_last_bits": args.first_last_bits or None,
        "seeds": args.seeds,
        "accuracies": found,
        "versions": versions(),
    }
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the sweep over tasks, bits and methods can be told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..shared.places import CALTECH, CIFAR, EFFICIENTNET, FLOWERS, MOBILENET, RESNET20, RESULTS, VIT_TINY
from .methods import DEFAULT, METHODS
from .task import Paths
from .tasks import TASKS, USUAL


@dataclass
class AccuracyArguments:
    """What to run. Everything an outcome depends on is stored with it."""

    tasks: list[str] = field(default_factory=lambda: list(USUAL), metadata={"help": f"Some of {', '.join(TASKS)}."})
    methods: list[str] = field(default_factory=lambda: list(DEFAULT), metadata={"help": f"Some of {list(METHODS)}."})
    bits: list[int] | None = field(default=None, metadata={"help": "Of weights and activations; default: the task's."})
    seeds: list[int] = field(default_factory=lambda: list(range(5)), metadata={"help": "Of images, order, dropout."})
    images_per_class: list[int] | None = field(
        default=None, metadata={"help": "Instead of the task's own number, with the learning rate and radii for that."}
    )
    processes: int = field(default=1, metadata={"help": "Runs at the same time, each with one thread."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    results: str = field(default=f"{RESULTS}/accuracy", metadata={"help": "Where the JSON results go."})
    trials: str | None = field(
        default=None,
        metadata={"help": "Where the results of runs go that settings are chosen by; default: --results."},
    )
    cache: str = field(default="outputs/accuracy", metadata={"help": "Decoded images and float models."})
    flowers: str = field(default=FLOWERS, metadata={"help": "Flowers-102 as parquet files."})
    mobilenet: str = field(default=MOBILENET, metadata={"help": "MobileNetV2 1.0, 224."})
    cifar: str = field(default=CIFAR, metadata={"help": "CIFAR-10 as parquet files."})
    resnet20: str = field(default=RESNET20, metadata={"help": "Weights of ResNet-20."})
    caltech: str = field(default=CALTECH, metadata={"help": "Caltech-101 as parquet files."})
    vit_tiny: str = field(default=VIT_TINY, metadata={"help": "ViT-tiny/16 of transformers, 224."})
    efficientnet: str = field(default=EFFICIENTNET, metadata={"help": "EfficientNet-Lite0 of timm, 224."})

    def __post_init__(self) -> None:
        for name, found, known in (("tasks", self.tasks, TASKS), ("methods", self.methods, METHODS)):
            unknown = sorted(set(found) - set(known))
            if unknown:
                raise ValueError(f"--{name} {unknown}: unknown; expected some of {list(known)}.")
        self.check_seeds()
        possible = {bits for name in self.tasks for bits in TASKS[name].bits}
        if self.bits is not None and not set(self.bits) & possible:
            raise ValueError(
                f"--bits {self.bits}: none of the tasks {self.tasks} has these; found {sorted(possible)}."
            )
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes}: expected at least one.")

    def check_seeds(self) -> None:
        trials = {seed for name in self.tasks for seed in TASKS[name].trial_seeds}
        if set(self.seeds) & trials:
            raise ValueError(f"--seeds {self.seeds}: expected none of {sorted(trials)}, which radii are chosen with.")

    def paths(self) -> Paths:
        return Paths(**{place.name: Path(getattr(self, place.name)) for place in fields(Paths)})

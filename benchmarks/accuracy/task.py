"""What a task of the accuracy benchmark is: images, a float model, and how its quantized self is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shared.images import Batch, Images, shuffled_batches
from ..shared.training_loop import adamw, sgd
from .methods import CASES, METHODS, SAQ


@dataclass(frozen=True)
class Paths:
    """Where tasks find their data, and a directory for what they keep (decoded images, float models)."""

    flowers: Path
    mobilenet: Path
    cifar: Path
    resnet20: Path
    caltech: Path
    vit_tiny: Path
    efficientnet: Path
    cache: Path


@dataclass(frozen=True)
class Data:
    """The images of a task.

    Attributes:
        training: To draw training images from.
        validation: To choose learning rates and radii by; none of them is trained or tested on.
        augmented: From stored pixels to what the model trains on, with a generator for what is random.
        plain: From stored pixels to what the model is evaluated on.
    """

    training: Images
    validation: Images
    test: Images
    augmented: Callable[[Tensor, torch.Generator], Tensor]
    plain: Callable[[Tensor], Tensor]

    def training_batches(self, images: Images, batch_size: int, seed: int) -> Iterator[Batch]:
        """Augmented batches of `images` without end; orders and augmentation depend on `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        for batch in shuffled_batches(images, batch_size, generator):
            yield {"pixels": self.augmented(batch.pixels, generator), "labels": batch.labels}

    def evaluation_batches(self, images: Images, batch_size: int = 250) -> Iterator[Batch]:
        """Every one of `images` once, as it is."""
        for start in range(0, len(images), batch_size):
            batch = images[slice(start, start + batch_size)]
            yield {"pixels": self.plain(batch.pixels), "labels": batch.labels}


@dataclass(frozen=True)
class Task:
    """A model and its images.

    Attributes:
        title: Of model and images, for the report.
        description: Sentences on what they are and how the float model comes about, for the report.
        load: The images.
        build: The model with random weights, of the shapes of the float model.
        train_float: Float model from the images, those that a seed has drawn, and that seed.
        float_per_seed: Whether every seed has a float model, trained on its own images; else they share one.
        images_per_class: That a seed draws; `None`: all.
        steps: Optimizer steps of quantized training.
        optimizer: `adamw` or `sgd`.
        learning_rates: To choose from on the validation images, with plain QAT; those of methods that perturb where
            `plain_learning_rates` are given.
        plain_learning_rates: Given, every method chooses a learning rate and a radius of its own, with as many trials
            for each; those that do not perturb choose from these.
        radii: To choose from on the validation images, for each case of its own.
        adaptive_radii: The same for the adaptive perturbation, whose radius is in other units.
        quantization: Fields of `SAQQuantizationConfig` besides the bits.
        shared_radius: Whether cases 1 and 2 use the radius of case 3: one of their own costs many runs.
        trial_seeds: Seeds to choose with.
        test_images: The first so many of them are tested on; `None`: all.
        channels_last: Whether convolutions run in that memory format, which is faster for some models.
        precision: Of the products in quantized training, `float32` or `bfloat16`; evaluation is in float32.
        needs: Fields of [`Paths`] that must be there.
        decoded: File in the cache with the images of `load`, by split, for tasks that can travel by it (`portable`).
        tuned_at: Bits at which learning rate and radii are chosen for all bits; `None`: for each by itself.
        tuned_as: Task whose stored trials say the learning rates and radii; `None`: it has trials of its own.
        reported: Whether no preset and no default is chosen on it (docs/protocol.md).
    """

    title: str
    description: str
    load: Callable[[Paths], Data]
    build: Callable[[], nn.Module]
    train_float: Callable[[Paths, Data, Images, int], nn.Module]
    float_per_seed: bool
    bits: tuple[int, ...]
    images_per_class: int | None
    steps: int
    batch_size: int
    optimizer: str
    weight_decay: float
    learning_rates: tuple[float, ...]
    plain_learning_rates: tuple[float, ...] = ()
    radii: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    adaptive_radii: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    quantization: dict[str, Any] = field(default_factory=dict)
    shared_radius: bool = False
    trial_seeds: tuple[int, ...] = (100,)
    test_images: int | None = None
    channels_last: bool = False
    precision: str = "float32"
    needs: tuple[str, ...] = ()
    decoded: str | None = None
    tuned_at: int | None = None
    tuned_as: str | None = None
    reported: bool = False

    def __post_init__(self) -> None:
        for name in ("radii", "adaptive_radii") if self.plain_learning_rates else ():
            trials = len(self.learning_rates) + len(getattr(self, name)) - 1
            if trials != self.trials:
                raise ValueError(
                    f"{self.title}: {self.trials} plain_learning_rates; expected {trials}, as many as learning_rates "
                    f"and {name} have trials."
                )

    @property
    def trials(self) -> int:
        """Of every method, each with all `trial_seeds`; 0 where methods share a learning rate."""
        return len(self.plain_learning_rates)

    def radii_of(self, method: str) -> tuple[float, ...]:
        """What `method` may choose from, smallest first."""
        return tuple(sorted(self.adaptive_radii if "adaptive" in (METHODS[method].saq or {}) else self.radii))

    def radius_of(self, method: str) -> str:
        """The method whose radius `method` uses."""
        own = METHODS[method].radius_of
        return SAQ if self.shared_radius and own in CASES else own

    def optimizer_of(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Quantizers' values in a group of their own, at a tenth of the rate; no decay but of weights."""
        return (sgd if self.optimizer == "sgd" else adamw)(model, lr, self.weight_decay)

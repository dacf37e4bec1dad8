"""Every quantizer at 4, 3 and 2 bits after the same short fine-tune: ResNet-20 on CIFAR-10.

    python -m benchmarks.quantizers.sweep     # what `make quantizers` runs; goes on where it was interrupted

Float weights -> adapted to the images at hand -> quantized, calibrated, trained -> docs/quantizers.md. Learning rates
are chosen on images held out from training; test images are only ever scored. "float" takes part like a quantizer: the
same fine-tune of the same model in float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_saq.quantizers import QUANTIZERS

from ..shared.cifar_data import Cifar, load_cifar
from ..shared.cifar_resnet import CifarResNet, load_weights
from ..shared.cifar_training import accuracy, train
from ..shared.command_line import parsed
from ..shared.images import Images
from ..shared.places import CIFAR, RESNET20, RESULTS
from ..shared.runs import Runs, fingerprint_of
from .fine_tunes import Material, first_weight_grids, table_run, trial
from .page import FLOAT, MODULE, page

SPLIT_SEED = 0


@dataclass
class TableArguments:
    """What to run. Anything but the paths is stored with each result."""

    data: str = field(default=CIFAR, metadata={"help": "Directory of CIFAR-10 as parquet files."})
    weights: str = field(default=RESNET20, metadata={"help": "Float weights of ResNet-20."})
    results: str = field(default=f"{RESULTS}/quantizers", metadata={"help": "Where the JSON results go."})
    document: str = field(default="docs/quantizers.md", metadata={"help": "The page to write."})
    cache: str = field(default="outputs/cifar", metadata={"help": "Decoded images and the adapted float model."})
    quantizers: list[str] = field(
        default_factory=lambda: list(QUANTIZERS), metadata={"help": "Which quantizers, besides float."}
    )
    bits: list[int] = field(default_factory=lambda: [4, 3, 2], metadata={"help": "Of weights and activations."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the order and augmentation."})
    learning_rates: list[float] = field(
        default_factory=lambda: [0.003, 0.01, 0.03, 0.1],
        metadata={"help": "From which each quantizer gets its own; tried from the smallest up."},
    )
    steps: int = field(default=64, metadata={"help": "Optimizer steps of a fine-tune."})
    search_steps: int = field(default=24, metadata={"help": "Optimizer steps of a trial of a learning rate."})
    batch_size: int = field(default=32, metadata={"help": "Images of a step."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Of weights; norms and scales have none."})
    float_steps: int = field(default=128, metadata={"help": "Optimizer steps of the adaptation."})
    float_batch_size: int = field(default=64, metadata={"help": "Images of such a step."})
    float_learning_rate: float = field(default=0.01, metadata={"help": "Of the adaptation, at its start."})
    validation_images: int = field(default=1000, metadata={"help": "Held out from training to choose learning rates."})
    test_images: int = field(default=5000, metadata={"help": "The first test images: what a fine-tune is scored on."})
    calibrated_images: int = field(
        default=1000, metadata={"help": "The first test images: what a model is scored on before it."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.quantizers) - set(QUANTIZERS))
        if unknown:
            raise ValueError(f"--quantizers {unknown}: unknown; expected some of {sorted(QUANTIZERS)}.")
        if not self.learning_rates:
            raise ValueError("--learning_rates: found none; expected at least one.")


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(TableArguments, argv, MODULE, __doc__)
    runs = Runs(Path(args.results), command)

    training, validation, test = split(load_cifar(args.data, args.cache), args.validation_images)
    float_state, fingerprint = adapted_float_model(args, runs, training, test)
    material = Material(training, validation, test, float_state)

    for quantizer in [FLOAT, *args.quantizers]:
        lr = chosen_learning_rate(args, runs, material, quantizer, fingerprint)
        for bits in [32] if quantizer == FLOAT else args.bits:
            for seed in args.seeds:
                arguments = {
                    "kind": "run",
                    "quantizer": quantizer,
                    "bits": bits,
                    "seed": seed,
                    "lr": lr,
                    "steps": args.steps,
                    "batch_size": args.batch_size,
                    "weight_decay": args.weight_decay,
                    "test_images": min(args.test_images, len(test)),
                    "calibrated_images": min(args.calibrated_images, len(test)),
                    "float_model": fingerprint,
                }
                name = f"{quantizer}-w{bits}a{bits}-seed{seed}"
                runs.once(name, arguments, partial(table_run, material, arguments))
    arguments = {"kind": "grids", "quantizers": args.quantizers, "bits": args.bits, "float_model": fingerprint}
    runs.once("first-weight-grids", arguments, partial(first_weight_grids, material, arguments))
    Path(args.document).parent.mkdir(parents=True, exist_ok=True)
    Path(args.document).write_text(page(Path(args.results)), encoding="utf-8")


def split(cifar: Cifar, held_out: int) -> tuple[Images, Images, Images]:
    """Training, validation and test images. Which training images are held out never changes for one `held_out`."""
    if not 0 < held_out < len(cifar.train):
        raise ValueError(f"--validation_images {held_out}: expected 1 to {len(cifar.train) - 1}, a part of training.")
    order = torch.randperm(len(cifar.train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return cifar.train[order[held_out:]], cifar.train[order[:held_out]], cifar.test


def adapted_float_model(
    args: TableArguments, runs: Runs, training: Images, test: Images
) -> tuple[dict[str, torch.Tensor], str]:
    """The float model after a short fine-tune on these images, and the fingerprint of its weights."""
    arguments = {
        "kind": "adaptation",
        "weights": Path(args.weights).name,
        "steps": args.float_steps,
        "batch_size": args.float_batch_size,
        "lr": args.float_learning_rate,
        "weight_decay": args.weight_decay,
        "seed": SPLIT_SEED,
        "training_images": len(training),
        "validation_images": args.validation_images,
        "test_images": len(test),
    }
    stored = Path(args.cache, "resnet20-adapted.safetensors")

    def adapt() -> dict[str, Any]:
        model = load_weights(CifarResNet(20), args.weights)
        before = accuracy(model, test)
        rest = {key: arguments[key] for key in ("steps", "batch_size", "lr", "weight_decay", "seed")}
        loss = train(model, training, **rest)  # type: ignore[arg-type]
        stored.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), stored)
        return {
            "test_before": before,
            "test_after": accuracy(model, test),
            "training_loss": loss,
            "fingerprint": fingerprint_of(model.state_dict()),
        }

    wanted = runs.once("float-adaptation", arguments, adapt)["outcome"]["fingerprint"]
    found = fingerprint_of(load_file(stored)) if stored.is_file() else None
    if found != wanted:  # results from elsewhere, or of another cache
        found = adapt()["fingerprint"]
    if found != wanted:
        raise ValueError(
            f"{runs.directory}: its runs started from a float model with the fingerprint {wanted}, which cannot be "
            f"made here again (this one has {found}). To run everything anew, name an empty directory with --results."
        )
    return load_file(stored), wanted


def chosen_learning_rate(
    args: TableArguments, runs: Runs, material: Material, quantizer: str, fingerprint: str
) -> float:
    """The smallest candidate within one standard error of the best in validation accuracy.

    Each is scored after a shorter fine-tune at the lowest number of bits. They are tried from the smallest up, until
    one is worse than the best so far by two standard errors: the rest diverges further.
    """
    scores: dict[float, float] = {}
    for lr in sorted(args.learning_rates):
        arguments = {
            "kind": "trial",
            "quantizer": quantizer,
            "bits": 32 if quantizer == FLOAT else min(args.bits),
            "seed": min(args.seeds),
            "lr": lr,
            "steps": args.search_steps,
            "batch_size": args.batch_size,
            "weight_decay": args.weight_decay,
            "float_model": fingerprint,
        }
        record = runs.once(f"lr-{quantizer}-{lr:g}", arguments, partial(trial, material, arguments))
        scores[lr] = record["outcome"]["validation"]
        if scores[lr] < max(scores.values()) - 2 * standard_error(scores, args.validation_images):
            break
    good_enough = max(scores.values()) - standard_error(scores, args.validation_images)
    return min(lr for lr, score in scores.items() if score >= good_enough)


def standard_error(scores: dict[float, float], images: int) -> float:
    """Of the best of these shares of correct `images`."""
    best = max(scores.values())
    return math.sqrt(best * (1 - best) / images)


if __name__ == "__main__":
    main()

"""Where does a cheap `eps` point? Compared with that of a whole first pass, on single batches of a task.

    python -m benchmarks.accuracy.directions.measure --task flowers --bits 4 --lr 1e-3 --steps 100 --rho 0.1
    python -m benchmarks.accuracy.directions.measure --task flowers-vit --bits 4 --lr 3e-4 --steps 60 --rho 0.03

The model is quantized, calibrated and trained plainly for some steps. Then, for each of some training batches and at
one radius: the cosine of each `eps` with that of the whole batch in all layers, and the rise of the loss of the whole
batch relative to the rise that that one causes. Dropout is off. Images of a low resolution are the same ones made
smaller; the images with the largest losses are those of this very batch and model. Writes a JSON for each task, and
docs/directions.md from all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness import Displacement

from ...shared.command_line import parsed
from ...shared.images import Batch
from ...shared.markdown import head, row
from ...shared.places import RESULTS
from ...shared.runs import Runs, records_in
from ...shared.training_loop import logits_of, take_steps
from ..arguments import AccuracyArguments
from ..sweep import is_at_hand
from ..task import Paths
from ..tasks import TASKS
from ..training import prepared

SEED, BATCHES, DEPTHS, PARTS = 100, 6, (0.5, 0.25, 0.125, 0.02), (4, 8)
Loss = Callable[[], Tensor]


@dataclass
class DirectionArguments(AccuracyArguments):
    """Which task, and where in its training. The options of the sweep say where data are."""

    task: str = field(default="flowers", metadata={"help": "A task of the sweep."})
    lr: float = field(default=1e-3, metadata={"help": "Learning rate of the plain steps before."})
    steps: int = field(default=100, metadata={"help": "How many of them."})
    rho: float = field(default=0.1, metadata={"help": "Radius of every eps."})
    results: str = field(default=f"{RESULTS}/directions", metadata={"help": "Where the JSON results go."})
    document: str = field(default="docs/directions.md", metadata={"help": "The page to write."})

    def __post_init__(self) -> None:
        self.tasks = [self.task]
        super().__post_init__()


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(DirectionArguments, argv, "benchmarks.accuracy.directions.measure", __doc__)
    if is_at_hand(args.task, args.paths()):
        keys = ("task", "lr", "steps", "rho")
        arguments = {**{key: getattr(args, key) for key in keys}, "bits": (args.bits or [4])[0]}
        Runs(Path(args.results), command).once(args.task, arguments, partial(measure, arguments, args.paths()))
    write_page(Path(args.results), Path(args.document))


def measure(arguments: dict[str, Any], paths: Paths) -> dict[str, Any]:
    """Mean cosine and relative rise of each way to make `eps`, over batches."""
    torch.set_num_threads(1)
    task = TASKS[arguments["task"]]
    own = {"seed": SEED, "images_per_class": None, "device": "cpu", "quantization": task.quantization}
    start = prepared({**own, "task": arguments["task"], "bits": arguments["bits"]}, paths)
    model, batches = start.model, start.data.training_batches(start.images, task.batch_size, SEED)
    torch.manual_seed(SEED)
    take_steps(model, batches, arguments["steps"], task.optimizer_of(model, arguments["lr"]))
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found: dict[str, list[tuple[float, float]]] = {}
    shares: dict[str, float] = {}
    for _ in range(BATCHES):
        for way, values, share in directions_of(model, next(batches), arguments["rho"]):
            found.setdefault(way, []).append(values)
            shares[way] = share
    return {
        way: {"cost": shares[way], "cosine": mean(c for c, _ in pairs), "rise": mean(r for _, r in pairs)}
        for way, pairs in found.items()
    }


def directions_of(model: nn.Module, batch: Batch, rho: float) -> list[tuple[str, tuple[float, float], float]]:
    """For each way: its name, its cosine and relative rise, and the share of a pass that it costs, as is counted."""
    minimizer = SharpnessAwareMinimizer(model, rho)
    pixels, labels = batch["pixels"], batch["labels"]
    size = pixels.shape[-1]

    def loss(chosen: Tensor | slice = slice(None), side: int = size) -> Tensor:
        given = pixels[chosen]
        if side == size:
            logits = logits_of(model, given)
        else:
            given = interpolate(given, size=(side, side), mode="bilinear", antialias=True)
            more = (
                {"interpolate_pos_encoding": True}
                if getattr(getattr(model, "config", None), "patch_size", None)
                else {}
            )
            logits = model(given, **more).logits
        return cross_entropy(logits, labels[chosen])

    def eps_of(compute: Loss) -> Displacement:
        minimizer.reset()
        with minimizer.ascent():
            compute().backward()
        return minimizer.climb()

    @torch.no_grad()
    def rise(eps: Displacement) -> float:
        with minimizer.displaced(eps):
            return (loss() - clean).item()

    with torch.no_grad():
        clean = loss()
        each = cross_entropy(logits_of(model, pixels), labels, reduction="none")
    hardest = each.argsort(descending=True, stable=True)
    whole = eps_of(loss)
    full_rise = rise(whole)
    rows = [("whole batch, all layers", (1.0, 1.0), 1.0)]

    def add(way: str, eps: Displacement, share: float) -> None:
        rows.append((way, (cosine(eps, whole), rise(eps) / full_rise), share))

    for part in PARTS:
        count = max(2, len(labels) // part)
        add(f"1/{part} of the batch", eps_of(partial(loss, slice(count))), 1 / part)
        add(f"the 1/{part} with the largest losses", eps_of(partial(loss, hardest[:count])), 1 / part)
    for divisor in (4, 2):
        side = size // divisor // 16 * 16 or size // divisor
        add(f"images of {side} px instead of {size}", eps_of(partial(loss, side=side)), (side / size) ** 2)
    for depth in DEPTHS:
        late = minimizer.perturb_last_layers(depth, lambda: loss().backward())
        model.zero_grad()
        add(f"last layers, depth {depth:g}", eps_of(loss), late.share)
        minimizer.perturb_all()
    minimizer.detach()
    return rows


def cosine(one: Displacement, other: Displacement) -> float:
    """Cosine of two displacements; what one of them does not move is zero there."""
    a, b = ({**eps.outputs, **eps.in_place} for eps in (one, other))
    inner = sum((a[key].double() * b[key].double()).sum().item() for key in a if key in b)
    lengths = [math.sqrt(sum(v.double().square().sum().item() for v in eps.values())) for eps in (a, b)]
    return inner / math.prod(lengths)


def write_page(results: Path, document: Path) -> None:
    """Write what is stored in `results`."""
    lines = [
        "# Where a cheap perturbation points",
        "",
        "Written by `python -m benchmarks.accuracy.directions.measure` from `benchmarks/results/directions`.",
        "",
        f"Means over {BATCHES} training batches of a model that was trained plainly for some steps, all `eps` of one "
        "length. Cosine: with the `eps` of the whole batch in all layers. Rise: of the loss of the whole batch, "
        "relative to the rise that this one causes. Share: of a whole first pass, as counted.",
        "",
    ]
    for record in records_in(results):
        arguments, outcome = record["arguments"], record["outcome"]
        lines += [
            f"## {TASKS[arguments['task']].title}, W{arguments['bits']}A{arguments['bits']}, after "
            f"{arguments['steps']} steps, radius {arguments['rho']:g}",
            "",
            *head("eps made of", "share", "cosine", "rise"),
            *(
                row(way, f"{found['cost']:.2f}", f"{found['cosine']:.2f}", f"{found['rise']:.2f}")
                for way, found in outcome.items()
            ),
            "",
        ]
    lines += [
        "A part of the batch, or its images at a lower resolution, find a direction of their own, above all under "
        "batch norm: the loss of the whole batch hardly rises there. The whole batch in the last layers alone moves "
        "along a part of the very gradient. That is why `ascent_depth` exists; what it keeps of the gain in accuracy "
        "is in [results.md](results.md).",
        "",
        "The images with the largest losses make most of the gradient of their batch, so an `eps` of them alone "
        "points almost where that of all does, on models without batch norm. To know them takes a forward of the "
        "whole batch, or losses that are an epoch old. It is not in the package: a direction that is close to the "
        "right one is no gain in accuracy yet, as the head of a model shows, whose `eps` raises the loss most for "
        "its price.",
        "",
    ]
    document.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

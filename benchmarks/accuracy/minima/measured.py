"""Train a model as the accuracy benchmark does, score it, and measure the sharpness of its minimum."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_saq.analysis import sharpness

from ...shared.images import Batch
from ...shared.runs import Runs
from ...shared.training_loop import logits_of
from ..choosing import Chosen
from ..methods import ADAPTIVE, ECHO, SAQ
from ..study import Study, file_name
from ..task import Paths
from ..training import Prepared, moved, prepared, scores, train

LOOKED_AT = 128
"""Training images that sharpness and landscapes are taken on, at most."""
DIRECTIONS, ITERATIONS, SAMPLES, TOLERANCE = 3, 15, 5, 1e-2


def chosen(study: Study, stored: Path, methods: list[str]) -> dict[str, Chosen]:
    """Learning rates and radii as the sweep chose them: of the trials in `stored` where the task has some there.

    `echo` takes the radius of case 3: a step of it is displaced as far.
    """
    if any(stored.glob(f"{study.task_name}-w*-trial-*.json")):
        study = Study(
            study.task_name, study.bits, study.args, study.paths, Runs(stored, study.runs.command), study.pool
        )
    study.args.methods = [method for method in methods if method != ECHO]
    found = study.chosen()
    return {method: found[SAQ if method == ECHO else method] for method in methods}


@lru_cache(maxsize=4)
def _trained(arguments: str, paths: Paths) -> tuple[Prepared, dict[str, Any]]:
    told = json.loads(arguments)
    start = prepared(told, paths)
    outcome = train(told, start)
    return start, {**outcome, **scores(told, start)}


def trained(arguments: dict[str, Any], paths: Paths) -> tuple[Prepared, dict[str, Any]]:
    """Return the trained model of a run with what it started from, and its outcome; the last four are kept."""
    return _trained(json.dumps(arguments), paths)


def images_looked_at(start: Prepared, batch_size: int, count: int = LOOKED_AT) -> list[Batch]:
    """Training images as they are, without augmentation, in batches as large as those of training."""
    batches = start.data.evaluation_batches(start.images[slice(0, count)], batch_size)
    return [moved(batch, start.device, start.layout) for batch in batches]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(logits_of(model, batch["pixels"]), batch["labels"])


def radii(found: dict[str, Chosen]) -> tuple[float, float]:
    """The radii that all minima of a task are measured with, whatever trained them: those of case 3."""
    rho = found[SAQ].rho
    assert rho is not None
    adaptive = found[ADAPTIVE].rho if ADAPTIVE in found else None
    return rho, 10 * rho if adaptive is None else adaptive


def look(study: Study, arguments: dict[str, Any], rho: float, adaptive_rho: float) -> dict[str, Any]:
    """Train one model, score it, and measure the sharpness of its training loss; stored under the name of the run."""

    def run() -> dict[str, Any]:
        start, outcome = trained(arguments, study.paths)
        begin = time.process_time()
        found = sharpness(
            start.model,
            images_looked_at(start, arguments["batch_size"]),
            rho,
            adaptive_rho=adaptive_rho,
            random_directions=DIRECTIONS,
            power_iterations=ITERATIONS,
            tolerance=TOLERANCE,
            trace_samples=SAMPLES,
            loss=loss_of,
            progress=False,
        )
        looked = {"sharpness": found.to_dict(), "sharpness_cpu_seconds": time.process_time() - begin}
        return {**outcome, **looked}

    told = {**arguments, "measured": {"rho": rho, "adaptive_rho": adaptive_rho, "images": LOOKED_AT}}
    return study.runs.once(file_name(arguments, study.task), told, run)

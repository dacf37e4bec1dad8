"""What one run computes: a float model, quantized, calibrated, trained in one way and scored."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_saq import reestimate_batch_norm

from ..shared import digits_training
from ..shared.digits_training import BATCH_SIZE, WEIGHT_DECAY, accuracy, load_split
from ..shared.images import Images, draw, shuffled_batches
from ..shared.runs import fingerprint_of
from ..shared.training_loop import adamw, fit
from .averaging import LatentAverage
from .freezing import OscillationFreezing
from .tasks import TASKS
from .ways import WAYS


class Work:
    """Holds data and float models, and trains.

    Args:
        pool: Images that training images are drawn from.
        validation_images: Images to choose by; the rest is tested on.
    """

    def __init__(self, pool: int, validation_images: int):
        self.pool, self.validation, self.test = load_split(pool, validation_images)
        self.float_state: Callable[[str, int, int, float], dict[str, Tensor]] = lru_cache(maxsize=32)(
            self._float_state
        )

    def _images(self, task: str, seed: int) -> Images:
        return draw(self.pool, TASKS[task].images, seed)

    def _float_state(self, task: str, seed: int, epochs: int, lr: float) -> dict[str, Tensor]:
        model = TASKS[task].build(seed)
        digits_training.train(model, self._images(task, seed), epochs, lr, seed)
        return model.state_dict()

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return validation accuracy and, of a run that is no trial, test accuracy of one trained model."""
        task, way, seed = TASKS[arguments["task"]], WAYS[arguments["way"]], arguments["seed"]
        images = self._images(arguments["task"], seed)
        float_state = self.float_state(
            arguments["task"], seed, arguments["float_epochs"], arguments["float_learning_rate"]
        )
        model = task.quantized(float_state, images)
        batches = shuffled_batches(images, BATCH_SIZE, torch.Generator().manual_seed(seed))
        total = arguments["epochs"] * -(-len(images) // BATCH_SIZE)
        optimizer = adamw(model, arguments["lr"], WEIGHT_DECAY)
        own = arguments["own"]
        extra: LatentAverage | OscillationFreezing | None = None
        if way.extra == "average":
            extra = LatentAverage(model, optimizer, own["decay"])
        elif way.extra == "freeze":
            extra = OscillationFreezing(model, optimizer, total, own["threshold"])
        torch.manual_seed(seed)  # of noise in eps; nothing else is random
        config = way.config(arguments["rho"], own)
        outcome = fit(model, map(Images.as_batch, batches), total, optimizer, config)
        if isinstance(extra, LatentAverage):
            extra.conclude()
        if isinstance(extra, OscillationFreezing):
            outcome["frozen_share"] = extra.frozen_share
        model.train()
        reestimate_batch_norm(model, images.pixels.split(BATCH_SIZE))
        outcome["float_model"] = fingerprint_of(float_state)
        outcome["validation"] = accuracy(model, self.validation)
        if arguments["kind"] == "run":
            outcome["test"] = accuracy(model, self.test)
        return outcome

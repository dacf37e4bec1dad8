"""The two tasks: a tiny ViT with layer norms and a small CNN with batch norms, both on few digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize

from ..shared.digits_training import small_cnn, tiny_vit
from ..shared.images import Images


@dataclass(frozen=True)
class Task:
    """A model and how it is quantized.

    Attributes:
        title: Of model and bits, for the page.
        build: The model with random weights that depend on a seed.
        quantization: Fields of `SAQQuantizationConfig`.
        images: Training images of a seed.
        epochs: Of quantized training.
        radius: What ways multiply to get the radii they choose from.
    """

    title: str
    build: Callable[[int], nn.Module]
    quantization: dict[str, Any]
    images: int
    epochs: int
    radius: float

    def quantized(self, float_state: dict[str, Tensor], images: Images) -> nn.Module:
        """Return the float model quantized and calibrated on `images`."""
        model = self.build(0)
        model.load_state_dict(copy.deepcopy(float_state))
        quantize(model, SAQQuantizationConfig(**self.quantization))
        calibrate(model, [images.pixels])
        return model


TASKS: dict[str, Task] = {
    "vit": Task(
        "tiny ViT (layer norms), W2A2",
        tiny_vit,
        {"weight_bits": 2, "activation_bits": 2},
        images=150,
        epochs=30,
        radius=0.2,
    ),
    "cnn": Task(
        "small CNN (batch norms), W3A3, scales per channel",
        small_cnn,
        {"weight_bits": 3, "activation_bits": 3, "weight_granularity": "channel"},
        images=120,
        epochs=40,
        radius=0.5,
    ),
}

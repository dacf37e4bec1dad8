"""Find the shape of the images that a model takes, and make some to trace and check it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.shared_inputs import image_channels, pair
from ..conversion.shared_inputs import image_size as size_of_images


def example_inputs(
    model: nn.Module, example: Tensor | None, image_size: int | tuple[int, int] | None, processor: Any
) -> Tensor:
    """Return `example` itself, or two images of standard normal noise in the size that the model takes.

    The size is, in this order: `image_size`; that of the image processor; that of the model's configuration.

    Args:
        example: Inputs `(batch, ...)`.
        image_size: Height and width in pixels, one number for both.
        processor: An image processor, or `None`.

    Raises:
        ValueError: If the size is not found or the arguments contradict each other.
    """
    if example is not None:
        if not isinstance(example, Tensor) or example.ndim < 2 or not len(example) or not example.is_floating_point():
            found = (
                f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
            )
            raise ValueError(f"example is {found}; expected a float tensor (batch, ...) of model inputs.")
        if image_size is not None:
            raise ValueError(
                "example and image_size were both given; the shape of the example is the one that counts."
            )
        return example.detach().float().cpu()
    size = pair(image_size) or _of_processor(processor) or size_of_images(model)
    if size is None:
        raise ValueError(
            f"{type(model).__name__}: the size of its images is in no configuration; pass image_size=(height, width), "
            "an image processor, or example=, a batch of inputs."
        )
    return torch.randn(2, image_channels(model), *size, generator=torch.Generator().manual_seed(0))


def _of_processor(processor: Any) -> tuple[int, int] | None:
    """Take the size of what an image processor puts out: it resizes, then crops."""
    if processor is None:
        return None
    cropped = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None
    for size in (cropped, getattr(processor, "size", None)):
        if isinstance(size, Mapping) or hasattr(size, "height"):
            values = dict(size) if isinstance(size, Mapping) else vars(size)
            if values.get("height") and values.get("width"):
                return values["height"], values["width"]
    return None

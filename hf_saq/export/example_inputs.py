"""Find the shape of the images that a model takes, and make some to trace and check it with."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..conversion.shared_inputs import image_channels, pair
from ..conversion.shared_inputs import image_size as size_of_images
from .extras import in_one_line

RGB = 3
SQUARE, OBLONG = ((64, 64), (96, 96)), ((64, 96),)
"""Height and width in pixels of the pictures that an image processor is tried on."""


def example_inputs(
    model: nn.Module, example: Tensor | None, image_size: int | tuple[int, int] | None, processor: Any
) -> Tensor:
    """Return `example` itself, or two images of standard normal noise in the size that the model takes.

    The size is, in this order: `image_size`; that of what the image processor makes of a square picture, if that does
    not depend on the picture; that of the model's configuration. An `image_size` that is not the processor's is
    warned of: a pipeline with that processor cannot run what was made for it.

    Args:
        example: Inputs `(batch, ...)`.
        image_size: Height and width in pixels, one number for both.
        processor: An image processor, or `None`.

    Returns:
        `(batch, ...)` in float32 on the CPU; `(2, channels, height, width)` where it is noise.

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
    channels, given = image_channels(model), pair(image_size)
    prepared = _prepared_by(processor, channels)
    if given and prepared and given != prepared:
        warnings.warn(
            f"image_size={image_size!r} is not what the image processor makes: {_in_words(prepared)}. Images of that "
            f"size do not fit what is made for {_in_words(given)}. Leave image_size out, or give the model a "
            "processor of its size.",
            stacklevel=3,
        )
    size = given or prepared or size_of_images(model)
    if size is None:
        raise ValueError(
            f"{type(model).__name__}: the size of its images is in no configuration; pass image_size=(height, width), "
            "an image processor, or example=, a batch of inputs."
        )
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def _prepared_by(processor: Any, channels: int) -> tuple[int, int] | None:
    """Return height and width of what `processor` makes of square pictures; `None` if they keep sizes of their own."""
    if processor is None:
        return None
    # Run it, since its fields say it in many ways: height and width, the shortest edge, a crop of either.
    try:
        made = _sizes(processor, channels, SQUARE)
        others = _sizes(processor, channels, OBLONG) - made
    except Exception as error:  # a processor raises whatever its library does
        warnings.warn(
            f"the image processor does not prepare a picture of {channels} channels, as the model takes: "
            f"{in_one_line(error)} Pictures must be prepared without it, or give the model one that fits.",
            stacklevel=4,
        )
        try:
            made, others = _sizes(processor, RGB, SQUARE), set()  # its size at least
        except Exception:
            return None
    if len(made) != 1:
        return None
    size = made.pop()
    if others:
        warnings.warn(
            f"the image processor makes {_in_words(size)} of a square picture and {_in_words(others.pop())} of an "
            "oblong one. What is exported takes one size, and a pipeline will fail on pictures of another shape. Let "
            "the processor crop (do_center_crop) or resize to a height and a width, as in training.",
            stacklevel=4,
        )
    return size


def _sizes(processor: Any, channels: int, shapes: tuple[tuple[int, int], ...]) -> set[tuple[int, int]]:
    found = set()
    for shape in shapes:
        picture = np.zeros((*shape, channels), np.uint8)
        height, width = processor(picture, return_tensors="pt")["pixel_values"].shape[-2:]
        found.add((height, width))
    return found


def _in_words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"

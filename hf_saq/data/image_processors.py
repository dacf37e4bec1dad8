"""Read from an image processor what inputs it makes, and check that transforms here make the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

COLOURS = ((0, 0, 0), (255, 255, 255), (200, 60, 120), (30, 210, 90))
"""Colours of the pictures that are compared. A picture of one colour stays so when it is scaled and cropped."""


def normalization(processor: Any) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel that `processor` normalizes with, for values from 0 to 1.

    Whatever else it does to values is in them: a `rescale_factor` of its own, no normalization (0 and 1), and the
    offset and the second normalization of EfficientNet. Channels are in the order of its output ([`flips_channels`]).
    """
    if hasattr(processor, "data_config"):  # of a timm model
        return list(processor.data_config["mean"]), list(processor.data_config["std"])
    rescales = getattr(processor, "do_rescale", True)
    scale = 255 * getattr(processor, "rescale_factor", 1 / 255) if rescales else 255.0
    offset = 1.0 if rescales and getattr(processor, "rescale_offset", False) else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", True):
        mean, std = _of_channels(processor.image_mean), _of_channels(processor.image_std)
    second = _of_channels(processor.image_std) if getattr(processor, "include_top", False) else [1.0] * 3
    return [(m + offset) / scale for m in mean], [s * t / scale for s, t in zip(std, second, strict=True)]


def _of_channels(values: Any) -> list[float]:
    """Return one value for each of three channels, of which a single one may stand for all."""
    given = list(values) if isinstance(values, (list, tuple)) else [values]
    return given * 3 if len(given) == 1 else given


def flips_channels(processor: Any) -> bool:
    """Say whether `processor` makes blue, green, red of red, green, blue, as that of MobileViT does."""
    return bool(getattr(processor, "do_flip_channel_order", False))


def input_size(processor: Any) -> int | tuple[int, int]:
    """Return the side of the square input that `processor` makes, in pixels; height and width if it is no square.

    Raises:
        ValueError: If it gives neither height and width nor the shortest edge.
    """
    if hasattr(processor, "data_config"):  # of a timm model
        height, width = processor.data_config["input_size"][-2:]
        return height if height == width else (height, width)
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    size = dict(crop or processor.size or {})
    if "height" in size and "width" in size:
        return size["height"] if size["height"] == size["width"] else (size["height"], size["width"])
    if "shortest_edge" in size:
        return size["shortest_edge"]
    raise ValueError(
        f"{type(processor).__name__} has the size {size}; expected height and width, or shortest_edge. Set its `size`."
    )


def check_makes_the_same(processor: Any, transform: Callable[[Image.Image], Tensor]) -> None:
    """Raise `ValueError` if `processor` makes other inputs than `transform` of pictures of the size that it makes.

    It is saved with the model, and `pipeline` takes it: models would be trained and scored on other inputs than they
    get there. What has no `preprocess`, as image processors have, cannot be run and is let through.

    Args:
        transform: Turns a picture of that size into `(3, height, width)`.
    """
    if not hasattr(processor, "preprocess"):
        return
    size = input_size(processor)
    height, width = size if isinstance(size, tuple) else (size, size)
    pictures = [Image.new("RGB", (width, height), colour) for colour in COLOURS]
    name, picture = type(processor).__name__, f"a picture of {height} x {width} pixels"
    todo = "Take the image processor of another model of that kind, or change its fields."
    try:
        theirs = processor(pictures, return_tensors="pt")["pixel_values"].float()
    except Exception as error:  # a processor raises whatever its library does
        raise ValueError(f"{name} does not prepare {picture} ({' '.join(str(error).split())}). {todo}") from error
    ours = torch.stack([transform(picture) for picture in pictures])
    if theirs.shape != ours.shape:
        raise ValueError(
            f"{name} makes {list(theirs.shape[1:])} of {picture}, the size that it names; expected "
            f"{list(ours.shape[1:])}. {todo}"
        )
    # Compare colours from 0 to 1. Scaling a picture may round them to the next of 256 steps.
    steps = 255 * torch.tensor(normalization(processor)[1])[:, None, None] * (theirs - ours).abs()
    wrong = ~(steps <= 1.01).all(dim=1)
    if wrong.any():
        which, row, column = wrong.nonzero()[0].tolist()
        made, here = ([round(v, 3) for v in each[which, :, row, column].tolist()] for each in (theirs, ours))
        raise ValueError(
            f"{name} makes {made} of the colour {COLOURS[which]} at row {row}, column {column} of {picture}, the size "
            f"that it names; expected {here}, as its rescaling, normalization and order of channels say, by which "
            f"images are prepared here. {todo}"
        )

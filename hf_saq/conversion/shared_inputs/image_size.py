"""Find the shape of the images that a model takes, by its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Return channels, height and width in pixels of what a model of transformers or timm says that it takes.

    Returns:
        `None` where nothing says it, as with most convolutional networks of transformers, which take any size.
    """
    config = getattr(model, "config", None)
    # What timm calls by these names, in the configuration of transformers' wrapper or on the model itself.
    pretrained = getattr(config, "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    arguments = getattr(config, "model_args", None) or {}
    size = pair(arguments.get("img_size") or getattr(config, "image_size", None))
    if size is None and pretrained.get("input_size"):
        size = tuple(pretrained["input_size"][-2:])
    channels = getattr(config, "num_channels", None) or arguments.get("in_chans") or 3
    return None if size is None else (channels, *size)


def pair(size: Any) -> tuple[int, int] | None:
    """Read `size` as height and width in pixels; one number is both.

    Raises:
        ValueError: If it is neither a positive number nor two of them.
    """
    if size is None:
        return None
    found = (size, size) if isinstance(size, int) else tuple(size)
    if len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise ValueError(f"image_size={size!r}; expected a positive number of pixels, or height and width.")
    return found

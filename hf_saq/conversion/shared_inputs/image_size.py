"""Find the size and the channels of the images that a model takes."""

from __future__ import annotations

from typing import Any

from torch import nn


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Return height and width in pixels of the images that a model of transformers or timm says that it takes.

    Returns:
        `None` where nothing says it, as with most convolutional networks of transformers, which take any size.
    """
    config = getattr(model, "config", None)
    # What timm calls by these names, in the configuration of transformers' wrapper or on the model itself.
    pretrained = getattr(config, "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    arguments = getattr(config, "model_args", None) or {}
    size = pair(arguments.get("img_size") or getattr(config, "image_size", None))
    return size if size or not pretrained.get("input_size") else tuple(pretrained["input_size"][-2:])


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images of a model have: as it says, else those of its first convolution, else 3."""
    said = getattr(getattr(model, "config", None), "num_channels", None)
    found = (getattr(module, "in_channels", None) for module in model.modules())  # packed layers have it too
    return said or next((channels for channels in found if isinstance(channels, int)), 3)


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

"""Make the images that forms are measured with: noise, or pictures of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rgb import to_rgb
from ..export.example_inputs import example_inputs
from ..export.extras import needed

IMAGES = 16
"""Images that predictions are compared on."""
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def images_for(
    model: nn.Module, processor: Any, folder: str | Path | None, image_size: int | tuple[int, int] | None
) -> tuple[Tensor, str]:
    """Make `(count, channels, height, width)` and say in a few words what they are.

    Args:
        folder: Takes the first pictures below it, in the order of their names, as `processor` prepares them.
            `None` makes noise of the size that the model takes.
        image_size: Height and width in pixels, where neither the processor nor the model's configuration says.

    Raises:
        ValueError: If the size is unknown, or the folder has no pictures or one that cannot be read or has more than
            8 bits a channel, or there is no processor for them.
    """
    if folder is None:
        shape = example_inputs(model, None, image_size, processor).shape[1:]
        return torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0)), f"{IMAGES} images of noise"
    if not Path(folder).is_dir():
        raise ValueError(f"images={str(folder)!r} is no folder; expected one with pictures.")
    if processor is None:
        raise ValueError(
            "the model has no image processor beside it, which pictures need; measure with noise instead."
        )
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)[:IMAGES]
    if not paths:
        raise ValueError(f"{folder} has no pictures; expected files that end in {', '.join(sorted(ENDINGS))}.")
    pictures = [_picture(path) for path in paths]
    return processor(pictures, return_tensors="pt")["pixel_values"].float(), f"{len(paths)} pictures"


def _picture(path: Path) -> Any:
    try:
        with needed("PIL.Image").open(path) as picture:
            return to_rgb(picture)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Replace or remove it.") from error

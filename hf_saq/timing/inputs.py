"""Make the images that forms are measured with: noise, or pictures of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion.shared_inputs import image_channels
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
        image_size: Height and width in pixels, where neither the processor nor the model's configuration says. What
            the processor makes of pictures is scaled to it; another size than the processor's is warned of.

    Raises:
        ValueError: If the size is unknown, or the folder has no pictures or one that cannot be read or has more than
            8 bits a channel, or there is no processor for them or it does not fit the model.
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
    # One by one: a processor may keep sizes of their own, which make no batch.
    prepared = [processor(_picture(path), return_tensors="pt")["pixel_values"].float() for path in paths]
    if image_size is not None:
        size = tuple(example_inputs(model, None, image_size, processor).shape[2:])  # warns of another size
        prepared = [x if x.shape[2:] == size else _scaled(x, size) for x in prepared]
    shapes = sorted({tuple(x.shape[1:]) for x in prepared})
    if len(shapes) > 1:
        raise ValueError(
            f"the image processor keeps the sizes of pictures: {shapes[0]} and {shapes[-1]} in {folder}; pass "
            "image_size (--image-size), to which they are scaled."
        )
    if shapes[0][0] != image_channels(model):
        raise ValueError(
            f"the image processor makes {shapes[0][0]} channels of a picture, but the model takes "
            f"{image_channels(model)}; measure with noise instead."
        )
    return torch.cat(prepared), f"{len(paths)} pictures"


def _scaled(images: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _picture(path: Path) -> Any:
    try:
        with needed("PIL.Image").open(path) as picture:
            return to_rgb(picture)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Replace or remove it.") from error

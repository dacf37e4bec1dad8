"""Turn pictures into RGB with 8 bits a channel. Needs no library of its own: pictures are Pillow's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def to_rgb(image: Image) -> Image:
    """Return `image` in mode RGB, of the same size.

    Raises:
        ValueError: If its pixels have more than 8 bits, which Pillow would cut off at 255 instead of scaling them:
            the picture would be white, or black where it has numbers from 0 to 1.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # I, I;16 and its byte orders
        kind = "floating-point numbers" if image.mode == "F" else "integers of 16 or 32 bits"
        raise ValueError(
            f"its mode is {image.mode!r}, {kind}; expected 8 bits a channel: scale its values to 0 to 255 and save it "
            "with 8 bits"
        )
    return image.convert("RGB")

"""Tensors that take long to make: made once, kept in a file, read from it ever after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .images import Images


def made_once(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors by name from the file `path`; make and write them first if there is no such file."""
    if not path.is_file():
        tensors = {name: value.contiguous() for name, value in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(path)  # an interrupted write leaves nothing that looks whole
    return load_file(path)


def splits_made_once(path: Path, splits: Sequence[str], decode: Callable[[str], Images]) -> list[Images]:
    """Read the images of every one of `splits` from the file `path`; decode and write them first if it is missing."""

    def make() -> dict[str, Tensor]:
        decoded = {split: decode(split) for split in splits}
        pixels = {f"{split}.pixels": images.pixels for split, images in decoded.items()}
        return pixels | {f"{split}.labels": images.labels for split, images in decoded.items()}

    tensors = made_once(path, make)
    return [Images(tensors[f"{split}.pixels"], tensors[f"{split}.labels"]) for split in splits]

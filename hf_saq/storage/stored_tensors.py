"""Read single tensors, and the sizes of tensors, from the weight files of a saved model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .weight_files import weight_files

_ITEM_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""By the type names of safetensors."""


class StoredTensors:
    """Finds tensors by their names on disk; nothing is read before it is asked for.

    Attributes:
        sizes: Name of each weight file -> its bytes.

    Raises:
        ValueError: If there is no weight file or one of them cannot be read.
    """

    def __init__(self, directory: Path):
        files = weight_files(directory)
        if not files:
            raise ValueError(f"{directory} has no weight file (*.safetensors).")
        self.sizes = {file.name: file.stat().st_size for file in files}
        self._where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._where |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise ValueError(
                    f"{file} cannot be read ({error}). It is cut off or damaged; get it again."
                ) from error

    def tensor(self, name: str) -> Tensor | None:
        """Read one tensor; `None` if no file has it."""
        if name not in self._where:
            return None
        with safe_open(self._where[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def bytes_of(self, name: str) -> int | None:
        """Tell the size of a tensor from the header of its file; `None` if no file has it."""
        if name not in self._where:
            return None
        with safe_open(self._where[name], framework="pt") as opened:
            part = opened.get_slice(name)
            return torch.Size(part.get_shape()).numel() * _ITEM_BYTES.get(part.get_dtype(), 4)

"""Save over an earlier save without a moment at which neither can be loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .weight_files import is_index, is_model_file

STAGE = "_saving"
"""Folder that a save is written to first, inside its directory; `Trainer` uploads nothing that begins with `_`."""


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Yield a directory to save into; when all its files are complete, they replace those of `directory`.

    A save that is killed before that changes nothing. The complete files are renamed one by one, weights first, which
    takes well under a millisecond: a save that is killed meanwhile leaves the earlier weights or the later ones. The
    files may not fit together then only if the two saves also differ in `config.json`, or in shards of the same names;
    loading then raises, because the seal of a packed checkpoint does not match. At the end weight files of an earlier
    save in another number of shards are removed: transformers would prefer an old `model.safetensors`.

    This protects from a killed process only. Nothing is flushed to disk, so a power failure may destroy both saves.
    """
    directory = Path(directory)
    stage = directory / STAGE
    shutil.rmtree(stage, ignore_errors=True)  # remove what a killed save left
    stage.mkdir(parents=True)
    try:
        yield stage
        new = sorted((path.relative_to(stage) for path in stage.rglob("*") if path.is_file()), key=_order)
        for path in new:
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / path, directory / path)
        written = {path.name for path in new}
        if any(is_model_file(name) for name in written):
            for path in directory.iterdir():
                if is_model_file(path.name) and path.name not in written:
                    path.unlink()
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _order(path: Path) -> tuple[int, str]:
    """Return the key that sorts weights first, then the index that names them, then everything else."""
    return (1 if is_index(path.name) else 0) if is_model_file(path.name) else 2, str(path)

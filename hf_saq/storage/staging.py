"""Save over an earlier save without a moment at which neither can be loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .weight_files import is_index, is_model_file

STAGE = "_saving"
"""Where a save is written first, inside its directory; `Trainer` uploads nothing that begins with an underscore."""


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Give a directory to save into. Its files replace those of `directory` when all of them are complete.

    Killed before that, a save changes nothing. The files are then renamed one by one, weights first, which takes well
    under a millisecond: a save killed in between leaves the earlier weights or the later ones. Only where the two
    saves also differ in `config.json`, or in shards of the same names, is there such a moment at which they do not fit
    together; loading then raises, as the seal of a packed checkpoint does not match. Weight files of an earlier save
    in another number of shards are removed at the end: transformers would prefer an old `model.safetensors`.

    This is about a killed process. Nothing is flushed to disk, so a power failure may take both.
    """
    directory = Path(directory)
    stage = directory / STAGE
    shutil.rmtree(stage, ignore_errors=True)  # of a save that was killed
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
    """Put shards first, then what makes them count, then everything else."""
    return (1 if is_index(path.name) else 0) if is_model_file(path.name) else 2, str(path)

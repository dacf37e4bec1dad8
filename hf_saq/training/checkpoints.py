"""Decide which training checkpoint may be trusted after a run was killed at any moment."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..storage.weight_files import holds_weights

STATE_FILE = "trainer_state.json"
"""`Trainer` writes it last: a checkpoint that has it is complete."""


def what_is_missing(checkpoint: str | Path) -> str | None:
    """Say why a run cannot be resumed from the directory `checkpoint`; return `None` if it can."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "it is not a directory"
    from ..storage.same_quantization import stored_quantization  # import it here: it imports transformers

    if stored_quantization(checkpoint).get("storage") == "packed":
        return "it holds packed integers, for inference; the float weights to train on are in a checkpoint-N folder"
    if (
        holds_weights(checkpoint)
        and not list(checkpoint.glob("optimizer*"))
        and not (checkpoint / STATE_FILE).exists()
    ):
        return (
            f"{STATE_FILE} is missing: it is a saved model and not a training checkpoint, or its save was not finished"
        )
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return f"{STATE_FILE} is missing or cut off, so the save was not finished"
    if not holds_weights(checkpoint):
        return "it holds no weights"
    for file in sorted(checkpoint.glob("*.safetensors")):  # check the files of a schedule too
        try:
            with safe_open(file, framework="pt"):
                pass  # opening compares the size of the file with its header
        except (SafetensorError, OSError) as error:
            return f"{file.name} cannot be read ({error})"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Find the newest `checkpoint-N` in `output_dir` whose save was finished. Return its path, or `None`."""
    numbered = []
    for child in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", child.name)
        if match and child.is_dir():
            numbered.append((int(match[1]), child))
    for _, child in sorted(numbered, reverse=True):
        if what_is_missing(child) is None:
            return str(child)
    return None

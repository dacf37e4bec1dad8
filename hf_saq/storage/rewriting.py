"""From one saved model to another: directories in, directories out."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..conversion.forms import dequantize, pack
from ..hub.card import model_card, weight_file_bytes
from ..hub.commits import copy_files
from .inspection import inspect_checkpoint, local_directory, model_class, stored_config

CARD = "README.md"


def pack_saved(source: str, target: str | Path) -> int:
    """Write the packed form of a model saved in float storage; its image processor goes along.

    Returns:
        Bytes of the weight files written.

    Raises:
        ValueError: If `source` is not such a model or `target` holds files already.
    """
    return _rewrite(source, Path(target), pack)


def dequantize_saved(source: str, target: str | Path) -> int:
    """Write the plain float model that a saved quantized one decodes to; needs no hf_saq to be loaded.

    Returns:
        Bytes of the weight files written.

    Raises:
        ValueError: If `source` is not a quantized model or `target` holds files already.
    """
    return _rewrite(source, Path(target), dequantize)


def write_card(directory: str | Path, load_from: str | None = None, overwrite: bool = False) -> Path:
    """Write the `README.md` of a saved model from what is stored there; how good it is, is not.

    Args:
        directory: The saved model.
        load_from: What the loading snippet names: the repository it will be in. Default: the directory's name.
        overwrite: Whether to replace a card that is there.

    Raises:
        ValueError: If there is a card already, or no model of hf_saq.
    """
    card = Path(directory) / CARD
    if card.exists() and not overwrite:
        raise ValueError(
            f"{card} exists; it may hold what was measured in training. Replace it with overwrite (--force)."
        )
    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is not a directory; expected that of a saved model.")
    found = inspect_checkpoint(str(directory))
    model_card(found.card_facts(load_from or Path(directory).absolute().name)).save(card)
    return card


def _rewrite(source: str, target: Path, change) -> int:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; name a new one.")
    directory = local_directory(source)
    kind = model_class(stored_config(directory))
    changed: nn.Module = change(kind.from_pretrained(directory))
    changed.save_pretrained(target)  # type: ignore[operator]
    copy_files([file.name for file in directory.glob("*processor_config.json")], directory, target)
    size = weight_file_bytes(target)
    assert size is not None
    return size

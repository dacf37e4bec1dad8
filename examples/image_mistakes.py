"""Answer what people get wrong about files and names in one line, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from image_model import ModelArguments

from hf_saq.data import UnreadableImageError, is_a_path


@contextmanager
def in_one_line(doing: str) -> Iterator[None]:
    """End the program with one line for what is wrong with the files, names and settings that were given."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join((str(error) or type(error).__name__).split())
        raise SystemExit(f"error while {doing}: {text}") from error


@contextmanager
def unreadable_images_in_one_line() -> Iterator[None]:
    """End the program with one line for an image that cannot be read, also where a worker process met it."""
    try:
        yield
    except UnreadableImageError as error:
        # A worker passes its whole traceback on; the last line of it is the error.
        text = str(error).strip().splitlines()[-1].split("UnreadableImageError: ")[-1]
        raise SystemExit(f"error: {text}") from error


def check_names(model_args: ModelArguments) -> None:
    """Raise `ValueError` for directories that are not there, which the Hub would be asked for otherwise."""
    if model_args.model_name_or_path is not None:
        _check_model("--model_name_or_path", model_args.model_name_or_path)
    name = model_args.image_processor_name
    if name is not None and not Path(name).is_dir() and is_a_path(name):
        raise ValueError(f"--image_processor_name {name!r}: there is no such directory.")


def check_is_float(model: Any, name: str) -> None:
    """Raise `ValueError` if a model that training is to start from is quantized already."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"--model_name_or_path {name!r} is quantized already; training starts from a float model, such as the "
            "folder 'float' of the run that made this one. To evaluate it give --do_eval without --do_train."
        )


def _check_model(flag: str, name: str) -> None:
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{flag} {name!r} is a file; expected the directory that holds config.json and the weights.")
    if path.is_dir() and not (path / "config.json").is_file():
        deeper = sorted(str(file.parent) for file in path.glob("*/config.json"))
        hint = f"did you mean {deeper[-1]!r}?" if deeper else "expected what save_pretrained or save_model wrote."
        raise ValueError(f"{flag} {name!r}: the directory has no config.json; {hint}")
    if not path.exists() and is_a_path(name):
        raise ValueError(
            f"{flag} {name!r}: there is no such directory. Expected a directory with config.json and weights, a model "
            "on the Hub (owner/name), or a name of timm."
        )

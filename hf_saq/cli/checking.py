"""Check before anything is measured, which takes long, what a command would only refuse, or leave out, at its end."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path

from ..installing import how_to_install

PAGES = (".html", ".htm")


def check_analysis(args: argparse.Namespace) -> None:
    """Check the arguments of `analyze` that need neither models nor images.

    Raises:
        ValueError: If a number is out of range, a file cannot be written, or an argument has no use.
        ImportError: If a picture is asked for and matplotlib is not installed.
    """
    output = Path(args.output)
    if output.suffix.lower() not in PAGES:
        raise ValueError(f"--output {args.output}: expected the name of an HTML file, such as analysis.html.")
    _check_place("--output", output)
    if args.landscape is not None:
        check_picture("--landscape", args.landscape)
    if args.points < 3 or args.points % 2 == 0:
        raise ValueError(f"--points {args.points}; expected an odd number >= 3, so that step 0 is among them.")
    if args.rho is not None and not 0 < args.rho < math.inf:
        raise ValueError(f"--rho {args.rho:g}; expected a finite number > 0.")
    if not args.passes > 0:
        raise ValueError(f"--passes {args.passes:g}; expected a number > 0.")
    for option, given, parts in (
        ("--landscape", args.landscape, ("landscape",)),
        ("--beside", args.beside, ("sharpness", "landscape")),
        ("--float", args.float_model, ("sensitivity",)),
    ):
        if given is not None and not set(parts) & set(args.parts):
            raise ValueError(
                f"{option} is for {' and '.join(parts)} alone, but --parts is {' '.join(args.parts)}. Add it there, "
                f"or leave {option} out."
            )


def check_picture(option: str, file: str) -> None:
    """Check that matplotlib can draw into `file`.

    Raises:
        ValueError: If it cannot be written, or its ending is no format of pictures.
        ImportError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            f"{option}: matplotlib is not installed; expected it for pictures: {how_to_install('plot')}."
        )
    from matplotlib.backend_bases import FigureCanvasBase

    ending, known = Path(file).suffix.lower().removeprefix("."), FigureCanvasBase.get_supported_filetypes()
    if ending and ending not in known:
        raise ValueError(f"{option} {file}: .{ending} is no format of pictures; expected one of {', '.join(known)}.")
    _check_place(option, Path(file))


def _check_place(option: str, file: Path) -> None:
    parent = file.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{option} {file}: there is no directory {str(parent)!r}.")
    if file.is_dir():
        raise ValueError(f"{option} {file}: is a directory; expected the name of a file.")

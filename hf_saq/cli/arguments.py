"""Parse the command line: `hf-saq inspect | pack | ...`. Nothing that is imported here takes time."""

from __future__ import annotations

import argparse

from ..export import ENGINES
from ..version import __version__
from .completion import SHELLS, PrintCompletion
from .data_arguments import add_data_arguments
from .suggesting import SuggestingParser

PARTS = ("sharpness", "landscape", "sensitivity")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser. The arguments that it parses have the name of the command as `command`."""
    parser = SuggestingParser("hf-saq", description="Look at quantized models that hf_saq saved, change them.")
    parser.add_argument("--version", action="version", version=f"hf_saq {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script that completes commands in this shell; it needs shtab",
    )
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    command = commands.add_parser("inspect", help="bits, sizes, scales and format of a saved model, layer by layer")
    command.add_argument("source", metavar="DIR_OR_REPO")
    command.add_argument("--revision", help="branch, tag or commit of a repository")
    command.add_argument("--json", action="store_true", help="machine-readable")

    command = commands.add_parser("pack", help="write a model saved in float storage as packed integers")
    command.add_argument("source", metavar="DIR")
    command.add_argument("target", metavar="OUT")

    command = commands.add_parser("dequantize", help="write a quantized model as a plain float model")
    command.add_argument("source", metavar="DIR")
    command.add_argument("target", metavar="OUT")

    command = commands.add_parser(
        "export", help="write a quantized model as an integer graph for other engines (ONNX)"
    )
    command.add_argument("source", metavar="DIR")
    command.add_argument("directory", metavar="OUT")
    command.add_argument("--weights", default="int8", help="int8 (fast) or int4 (small)")
    command.add_argument("--target", default="cpu", help="cpu (any), cpu-vnni or gpu")
    command.add_argument("--tuned-for", help="onnxruntime: write convolutions as it runs them fastest, others do not")
    command.add_argument("--image-size", type=int, nargs="+", help="pixels, or height and width, if not stored")
    command.add_argument("--engines", nargs="+", help="verify with onnxruntime, openvino; default: those installed")
    command.add_argument("--no-check", dest="check", action="store_false", help="write without verifying")
    command.add_argument("--overwrite", action="store_true", help="replace an export that is there")

    command = commands.add_parser(
        "eval", help="accuracy and loss of a saved model, float, quantized or exported, on images"
    )
    command.add_argument("source", metavar="DIR_OR_REPO")
    command.add_argument(
        "--engine",
        choices=ENGINES,
        help="run the exported graph on it, also one that lies beside the weights; default: onnxruntime for an export",
    )
    command.add_argument("--json", action="store_true", help="machine-readable")
    add_data_arguments(command, most=None)

    command = commands.add_parser("compare", help="two saved models side by side: agreement, layer by layer")
    command.add_argument("first", metavar="A")
    command.add_argument("second", metavar="B")
    command.add_argument("--plot", metavar="FILE", help="draw the layers into a file, such as layers.svg")
    command.add_argument("--json", action="store_true", help="machine-readable")
    add_data_arguments(command, most=None)

    command = commands.add_parser(
        "analyze", help="sharpness, loss landscape and sensitive layers of a quantized model, as one HTML page"
    )
    command.add_argument("source", metavar="DIR_OR_REPO")
    command.add_argument("--output", default="analysis.html", help="the page; default: analysis.html")
    command.add_argument("--beside", metavar="OTHER", help="another model whose minimum is shown on the same scale")
    command.add_argument(
        "--float",
        metavar="DIR",
        dest="float_model",
        help="its float model: sensitivities are then those of that model, quantized as the other was before training",
    )
    command.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help=f"what to measure; default: {' '.join(PARTS)}"
    )
    command.add_argument(
        "--landscape", metavar="FILE", help="draw the plane there too; cards show it from DIR/landscape.png"
    )
    command.add_argument("--rho", type=float, help="radius of the sharpness; default: that of the model family")
    command.add_argument("--points", type=int, default=21, help="odd number of steps along a line; half in a plane")
    command.add_argument("--passes", type=float, default=16.0, help="over the images, at most, for sensitivities")
    command.add_argument("--json", action="store_true", help="print machine-readable numbers")
    add_data_arguments(command, most=256)

    command = commands.add_parser(
        "benchmark", help="time, memory, size and agreement of every form of a quantized model, side by side"
    )
    command.add_argument("source", metavar="DIR")
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="images of a call; default: 1")
    command.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of a form; default: 1")
    command.add_argument("--rounds", type=int, default=10, help="how often all forms take turns; default: 10")
    command.add_argument("--forms", nargs="+", help="some forms alone: float, packed, onnx-int8 and so on")
    command.add_argument("--images", metavar="FOLDER", help="pictures to compare predictions on; default: noise")
    command.add_argument("--image-size", type=int, nargs="+", help="pixels, or height and width, if not stored")
    command.add_argument("--target", default="cpu", help="what is exported for: cpu (any), cpu-vnni or gpu")
    command.add_argument("--clock", default="wall", help="wall, or process for processor time; default: wall")
    command.add_argument("--json", action="store_true", help="machine-readable")

    command = commands.add_parser("card", help="write the model card (README.md) of a saved model")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--repo-id", help="the repository it will be in, for the loading snippet")
    command.add_argument("--force", action="store_true", help="replace a card that is there")
    return parser

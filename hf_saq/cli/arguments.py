"""Parse the command line: `hf-saq inspect | pack | ...`. Nothing that is imported here takes time."""

from __future__ import annotations

import argparse

from ..version import __version__


def make_parser() -> argparse.ArgumentParser:
    """Make the parser. The arguments that it parses have the name of the command as `command`."""
    parser = argparse.ArgumentParser("hf-saq", description="Look at quantized models that hf_saq saved, change them.")
    parser.add_argument("--version", action="version", version=f"hf_saq {__version__}")
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
    command.add_argument("--no-check", dest="check", action="store_false", help="write without verifying")
    command.add_argument("--overwrite", action="store_true", help="replace an export that is there")

    command = commands.add_parser(
        "benchmark", help="time, memory, size and agreement of every form of a quantized model, side by side"
    )
    command.add_argument("source", metavar="DIR")
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="images of a call; default: 1")
    command.add_argument("--threads", type=int, nargs="+", default=[1], help="threads of a form; default: 1")
    command.add_argument("--rounds", type=int, default=10, help="how often all forms take turns; default: 10")
    command.add_argument("--forms", nargs="+", help="some forms alone: float, packed, onnx-int8 and so on")
    command.add_argument("--images", help="folder of pictures to compare predictions on; default: noise")
    command.add_argument("--image-size", type=int, nargs="+", help="pixels, or height and width, if not stored")
    command.add_argument("--target", default="cpu", help="what is exported for: cpu (any), cpu-vnni or gpu")
    command.add_argument("--clock", default="wall", help="wall, or process for processor time; default: wall")
    command.add_argument("--json", action="store_true", help="machine-readable")

    command = commands.add_parser("card", help="write the model card (README.md) of a saved model")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--repo-id", help="the repository it will be in, for the loading snippet")
    command.add_argument("--force", action="store_true", help="replace a card that is there")
    return parser

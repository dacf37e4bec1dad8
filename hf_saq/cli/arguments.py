"""Parse the command line: `hf-saq inspect | pack | dequantize | card`. Nothing that is imported here takes time."""

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

    command = commands.add_parser("card", help="write the model card (README.md) of a saved model")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--repo-id", help="the repository it will be in, for the loading snippet")
    command.add_argument("--force", action="store_true", help="replace a card that is there")
    return parser

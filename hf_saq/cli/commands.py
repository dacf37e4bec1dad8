"""The command line: `hf-saq inspect | pack | dequantize | card`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from safetensors import SafetensorError
from transformers.utils import logging

from ..hub.card import kibibytes
from ..storage.inspection import inspect_checkpoint
from ..storage.rewriting import dequantize_saved, pack_saved, write_card


def _inspect(args: argparse.Namespace) -> str:
    found = inspect_checkpoint(args.source, args.revision)
    return json.dumps(found.to_dict(), indent=2) if args.json else str(found)


def _pack(args: argparse.Namespace) -> str:
    return f"{args.target}: {kibibytes(pack_saved(args.source, args.target))} of packed weights"


def _dequantize(args: argparse.Namespace) -> str:
    return f"{args.target}: {kibibytes(dequantize_saved(args.source, args.target))} of float weights"


def _card(args: argparse.Namespace) -> str:
    return str(write_card(args.directory, args.repo_id, args.force))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-saq", description="Look at quantized models that hf_saq saved, change them.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("inspect", help="bits, sizes, scales and format of a saved model, layer by layer")
    command.add_argument("source", metavar="DIR_OR_REPO")
    command.add_argument("--revision", help="branch, tag or commit of a repository")
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("pack", help="write a model saved in float storage as packed integers")
    command.add_argument("source", metavar="DIR")
    command.add_argument("target", metavar="OUT")
    command.set_defaults(run=_pack)

    command = commands.add_parser("dequantize", help="write a quantized model as a plain float model")
    command.add_argument("source", metavar="DIR")
    command.add_argument("target", metavar="OUT")
    command.set_defaults(run=_dequantize)

    command = commands.add_parser("card", help="write the model card (README.md) of a saved model")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--repo-id", help="the repository it will be in, for the loading snippet")
    command.add_argument("--force", action="store_true", help="replace a card that is there")
    command.set_defaults(run=_card)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 with one line on stderr; 2 for wrong arguments."""
    args = _parser().parse_args(argv)
    logging.disable_progress_bar()
    try:
        print(args.run(args))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # what the Hub raises is an OSError
        print(f"hf-saq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0

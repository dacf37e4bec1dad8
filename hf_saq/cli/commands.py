"""Carry out the commands of `hf-saq`: each one calls a function and returns the text to print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from safetensors import SafetensorError
from transformers.utils import logging

from ..analysis.results import plain
from ..export import export_onnx
from ..hub.card import write_card
from ..progress import bars_of_ours_alone
from ..storage import load_saved
from ..storage.inspection import inspect_checkpoint
from ..storage.rewriting import dequantize_saved, pack_saved
from ..tables import kibibytes
from ..timing import benchmark
from .looking import analyze, compare_two, evaluate


def _inspect(args: argparse.Namespace) -> str:
    found = inspect_checkpoint(args.source, args.revision)
    return json.dumps(plain(found.to_dict()), indent=2) if args.json else str(found)


def _pack(args: argparse.Namespace) -> str:
    return f"{args.target}: {kibibytes(pack_saved(args.source, args.target))} of packed weights"


def _dequantize(args: argparse.Namespace) -> str:
    return f"{args.target}: {kibibytes(dequantize_saved(args.source, args.target))} of float weights"


def _export(args: argparse.Namespace) -> str:
    model, processor = load_saved(args.source)
    report = export_onnx(
        model,
        args.directory,
        weights=args.weights,
        target=args.target,
        tuned_for=args.tuned_for,
        image_size=_image_size(args),
        processor=processor,
        check=args.check,
        engines=args.engines,
        overwrite=args.overwrite,
    )
    return f"{report}\n{args.directory}: exported"


def _benchmark(args: argparse.Namespace) -> str:
    result = benchmark(
        args.source,
        batch_sizes=args.batch_sizes,
        threads=args.threads,
        rounds=args.rounds,
        forms=args.forms,
        images=args.images,
        image_size=_image_size(args),
        target=args.target,
        clock=args.clock,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return json.dumps(result.to_dict(), indent=2) if args.json else str(result)


def _image_size(args: argparse.Namespace) -> int | tuple[int, int] | None:
    size = args.image_size
    return size[0] if size is not None and len(size) == 1 else size


def _card(args: argparse.Namespace) -> str:
    return str(write_card(args.directory, args.repo_id, args.force))


COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "inspect": _inspect,
    "pack": _pack,
    "dequantize": _dequantize,
    "export": _export,
    "benchmark": _benchmark,
    "card": _card,
    "eval": evaluate,
    "compare": compare_two,
    "analyze": analyze,
}


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed and print its text. Return the exit status: 0, or 1 with one line on stderr."""
    logging.disable_progress_bar()
    try:
        with bars_of_ours_alone():
            text = COMMANDS[args.command](args)
        _print(text)
    except (
        ValueError,
        OSError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:  # errors of the Hub are OSErrors
        print(f"hf-saq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _print(text: str) -> None:
    """Print `text` in characters that stdout has; be silent if its reader has gone, as `head` does."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # What was measured for minutes is not lost to the name of a folder.
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit

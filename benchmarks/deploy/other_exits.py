"""Try ExecuTorch with the integer form of a model, and store what came out; it needs `executorch` beside the project.

python -m benchmarks.deploy.other_exits      # writes benchmarks/results/other_exits
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_saq.export.integer_copy import LogitsOnly, integer_copy
from hf_saq.storage.saved_directory import load_saved

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import Runs, version_of
from .models import IMAGE_SIZE, save_quantized


@dataclass
class Options:
    """What is tried."""

    model: str = "vit-tiny"
    calls: int = 10
    results: Path = Path(RESULTS) / "other_exits"


def main(argv: Sequence[str] | None = None) -> None:
    options, command = parsed(Options, argv, "benchmarks.deploy.other_exits", __doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        save_quantized(options.model, Path(directory))
        model = load_saved(directory)[0]
    x = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    expected = model(x).logits.detach()
    program = torch.export.export(LogitsOnly(integer_copy(model, "int8")).eval(), (x,))
    plain = program.run_decompositions({**torch.export.default_decompositions(), **in_aten()})
    runs = Runs(options.results, command)
    arguments: dict[str, Any] = {"torch": version_of("torch"), "model": options.model, "calls": options.calls}

    def exported() -> dict[str, Any]:
        run = plain.module()
        return {
            "operators_of_ours": sum("hf_saq" in str(node.target) for node in program.graph.nodes),
            "model": _ran(lambda: model(x).logits, expected, options.calls),
            "exported": _ran(lambda: run(x), expected, options.calls),
        }

    runs.once(f"{options.model}-torch-export", arguments, exported)
    if find_spec("executorch") is None:
        print("executorch is not installed: it was not tried.", flush=True)
        return
    arguments["executorch"] = version_of("executorch")
    runs.once(f"{options.model}-executorch", arguments, lambda: lowered(plain, x, expected, options.calls))


def lowered(plain: Any, x: Tensor, expected: Tensor, calls: int) -> dict[str, Any]:
    """Lower a program to ExecuTorch, run it, and compare with the model."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    # XNNPACK alone: without it ExecuTorch has plain loops, which are no way to run a model of this size.
    content = to_edge_transform_and_lower(plain, partitioner=[_xnnpack()]).to_executorch().buffer
    with tempfile.NamedTemporaryFile(suffix=".pte") as file:
        file.write(content)
        file.flush()
        method = Runtime.get().load_program(file.name).load_method("forward")
        return {**_ran(lambda: method.execute([x])[0], expected, calls), "file_bytes": len(content)}


def in_aten() -> dict[Callable, Callable]:
    """Write the two operators of integer graphs in operators that every backend of PyTorch knows."""

    def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, high: int) -> Tensor:
        shift = zero_point.to(x.dtype)
        return ((x / scale).round().add(shift).clamp(0, high) - shift) * scale

    def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
        return codes * scale.reshape([-1 if i == axis and scale.ndim else 1 for i in range(codes.ndim)])

    return {
        torch.ops.hf_saq.quantize_dequantize.default: quantize_dequantize,
        torch.ops.hf_saq.dequantize.default: dequantize,
    }


def _xnnpack() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


@torch.no_grad()
def _ran(run: Callable[[], Tensor], expected: Tensor, calls: int) -> dict[str, float]:
    largest = float((run() - expected).abs().max() / expected.abs().max())
    seconds = []
    for _ in range(calls):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return {"milliseconds": 1000 * statistics.median(seconds), "largest_difference": largest}


if __name__ == "__main__":
    main()

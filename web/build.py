#!/usr/bin/env python
"""Build the web demo: a static page that draws digits and lets a float, a 4-bit and a 2-bit model answer.

    python web/build.py                            # what `make web-demo` runs, into outputs/web-demo/page
    python web/build.py --models outputs/digits    # with the models of `make demo`, trained longer

The models are those of `examples/run_image_classification.py` on scikit-learn's digits, trained a minute or less if
they are not there yet. The page holds all it needs: the models as ONNX, and the runtime from web/node_modules.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_saq  # noqa: F401 (registers the quantization method)
from hf_saq.export import export_onnx
from hf_saq.export.extras import needed
from hf_saq.export.passes import store
from hf_saq.export.tracing import trace
from hf_saq.storage import staged

WEB = Path(__file__).resolve().parent
sys.path.append(str(WEB.parent / "examples"))  # whose data and training these are
RUNTIME = WEB / "node_modules" / "onnxruntime-web" / "dist"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
SIDE = 8
MODELS = {
    "float": ("Float", "W32A32", "32-bit weights, activations"),
    "saq-w4a4": ("W4A4", "W4A4", "4-bit weights, activations"),
    "saq-w2a2": ("W2A2", "W2A2", "2-bit weights, activations"),
}
"""Directory of the run -> name, bits and description."""
SHORT_TRAINING = {
    "methods": "saq",
    "float_epochs": "15",
    "num_train_epochs": "8",
    "per_device_train_batch_size": "32",
}
SPACE = """\
---
title: Float, 4 bits, 2 bits
emoji: ✏️
colorFrom: blue
colorTo: gray
sdk: static
app_file: index.html
pinned: false
---

Draw a digit: the same vision transformer in float, in 4 and in 2 bits answers side by side, in the browser. Quantized
with hf_saq, exported to ONNX, run by ONNX Runtime for the web.
"""


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/web-demo/page"), help="the page")
    parser.add_argument("--models", type=Path, default=Path("outputs/web-demo/models"), help="a run of the example")
    args = parser.parse_args(argv)
    missing = [file for file in RUNTIME_FILES if not (RUNTIME / file).is_file()]
    if missing:
        parser.error(f"{RUNTIME} has no {', '.join(missing)}; run `make web-demo`, or npm install in {WEB}.")
    try:
        if not (args.models / "results.json").is_file():
            train(args.models)
        build(args.models, args.output_dir)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"{args.output_dir}: the page is built; serve this directory, it fetches nothing from elsewhere")
    return args.output_dir


def train(directory: Path) -> None:
    """Train the models with the example script, so that they lie in `directory` as `make demo` leaves its own."""
    from run_image_classification import main as run

    changes = [text for name, value in SHORT_TRAINING.items() for text in (f"--{name}", value)]
    run(["--output_dir", str(directory), *changes])


def build(models: Path, output: Path) -> None:
    """Export the models of a finished run and put the page together, all of it or nothing."""
    rows = {f"{row['method']}-{row['bits'].lower()}": row for row in json.loads((models / "results.json").read_text())}
    absent = [name for name in MODELS if not (models / name / "config.json").is_file()]
    if absent:
        raise ValueError(f"{models} has no {', '.join(absent)}; expected the output of the example with 4 and 2 bits.")
    with staged(output) as page:
        shutil.copytree(WEB / "page", page, dirs_exist_ok=True)
        (page / "runtime").mkdir()
        for file in RUNTIME_FILES:
            shutil.copy(RUNTIME / file, page / "runtime" / file)
        facts = []
        for directory, (name, bits, description) in MODELS.items():
            row = rows["float-w32a32" if directory == "float" else directory]
            graph = export(models / directory, page / "models" / directory, directory == "float")
            facts.append(
                {
                    "name": name,
                    "bits": bits,
                    "description": description,
                    "directory": f"models/{directory}",
                    "graph": graph,
                    "graph_bytes": (page / "models" / directory / graph).stat().st_size,
                    "packed_bytes": row["bytes"],
                    "top1": row["top1"],
                }
            )
        described = {"models": facts, "samples": held_out_samples()}
        (page / "models.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        (page / "README.md").write_text(SPACE, encoding="utf-8")


def export(source: Path, target: Path, is_float: bool) -> str:
    """Write the model in `source` as transformers.js and this page read it; returns the name of its graph."""
    model = AutoModelForImageClassification.from_pretrained(source).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    if not is_float:
        return export_onnx(model, target, processor=processor, engines=["onnxruntime"]).file
    graph = "onnx/model.onnx"
    (target / graph).parent.mkdir(parents=True)
    traced = trace(model, torch.zeros(2, 3, SIDE, SIDE))
    store(traced, "float")  # drops names and shapes, half a megabyte of them
    (target / graph).write_bytes(needed("onnx_ir").to_proto(traced).SerializeToString())
    model.config.save_pretrained(target)
    processor.save_pretrained(target)
    return graph


def held_out_samples() -> list[dict]:
    """One scan of each digit that no model was trained on, as pixels from 0 to 255."""
    import numpy as np

    from hf_saq.data.image_data import digits

    held_out = digits(seed=42)["validation"]  # the seed of the example, whose split is the same
    labels = held_out["label"][:]
    rows = [labels.index(digit) for digit in range(10)]
    return [{"label": labels[i], "pixels": np.asarray(held_out[i]["image"]).ravel().tolist()} for i in rows]


if __name__ == "__main__":
    main()

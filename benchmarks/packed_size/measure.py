"""Size on disk, peak memory and time to load: a 4-bit packed ViT-B/16 next to the float model (random weights).

    python -m benchmarks.packed_size.measure     # writes benchmarks/results/packed_size.json

Every measurement is a process of its own that loads one checkpoint and, in a second figure, runs one image through it.
Peak memory is what the process had in memory at most (mapped files included, as far as they were read), less what it
had after its imports. Files are read once before, so that times are those of a warm page cache; the figures are
medians over the repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize

from ..shared.places import RESULTS

ROOT = Path(__file__).resolve().parents[2]
MB = 10**6


def memory(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak) of this process. Linux only; `ru_maxrss` would be the parent's too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def measure(directory: str) -> dict[str, float]:
    """Load the checkpoint in `directory` in this process. Bytes beyond those after importing, and seconds."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports no longer counts
    before = memory("VmRSS")
    began = time.perf_counter()
    model = AutoModelForImageClassification.from_pretrained(directory)
    seconds = time.perf_counter() - began
    loaded = memory("VmHWM") - before
    # A float model that was only mapped has not been read yet: touching every byte is part of having loaded it.
    checksum = sum(float(tensor.double().sum()) for tensor in [*model.parameters(), *model.buffers()])
    touched = memory("VmHWM") - before
    began = time.perf_counter()
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    held = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    return {
        "seconds_to_load": seconds,
        "seconds_of_first_image": time.perf_counter() - began,
        "peak_bytes_loading": loaded,
        "peak_bytes_with_all_read": touched,
        "peak_bytes_with_one_image": memory("VmHWM") - before,
        "bytes_of_tensors": held,
        "checksum": checksum,
    }


def write_checkpoints(root: Path, layers: int, weight_bits: int) -> dict[str, Path]:
    torch.manual_seed(0)
    model_config = ViTConfig(num_hidden_layers=layers, num_labels=1000)  # type: ignore[call-arg]  # of its base class
    model = ViTForImageClassification(model_config)
    model.eval()
    model.save_pretrained(root / "float")
    config = SAQQuantizationConfig(weight_bits=weight_bits, activation_bits=8, scale_init="mean")
    calibrate(quantize(model, config), [torch.randn(1, 3, 224, 224)])
    pack(model).save_pretrained(root / "packed")  # type: ignore[operator]
    return {name: root / name for name in ("float", "packed")}


def in_child(directory: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    command = [sys.executable, "-m", "benchmarks.packed_size.measure", "--measure", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {directory} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(layers: int, weight_bits: int, repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        directories = write_checkpoints(Path(root), layers, weight_bits)
        result: dict[str, Any] = {
            "model": f"ViT-B/16, {layers} layers, random weights",
            "weight_bits": weight_bits,
            "repetitions": repetitions,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | {"transformers": transformers.__version__},
        }
        for name, directory in directories.items():
            weights = directory / "model.safetensors"
            weights.read_bytes()
            runs = [in_child(directory) for _ in range(repetitions)]
            result[name] = {"file_bytes": weights.stat().st_size} | {
                key: statistics.median(one[key] for one in runs) for key in runs[0]
            }
    packed, full = result["packed"], result["float"]
    result["packed_over_float"] = {key: packed[key] / full[key] for key in packed if key != "checksum"}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="DIRECTORY", help="load this one and print what it took")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--weight_bits", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=f"{RESULTS}/packed_size.json")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    result = run(arguments.layers, arguments.weight_bits, arguments.repetitions)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("float", "packed"):
        found = result[name]
        print(f"{name:7}", *(f"{key} {found[key] / MB:.1f} MB" for key in found if "bytes" in key), sep="  ")
        print(f"{'':7}", *(f"{key} {found[key]:.2f}" for key in found if "seconds" in key), sep="  ")


if __name__ == "__main__":
    main()

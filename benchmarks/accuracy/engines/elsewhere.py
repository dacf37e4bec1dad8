"""Run a graph in a process of its own, which an emulator of another CPU may start."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_saq.installing import how_to_install

from . import run_graph


def run_elsewhere(engine: str, launcher: str, graph: Path, images: Path) -> np.ndarray:
    """Logits of a graph in a process of its own; `launcher` is what starts Python there."""
    logits = graph.with_suffix(".logits.npy")
    command = [*shlex.split(launcher), sys.executable, run_graph.__file__, str(graph), str(images), str(logits)]
    try:
        subprocess.run([*command, "--engine", engine], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"{launcher!r} cannot be run ({error}); install QEMU, or name another --emulator.") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise ValueError(f"{engine} failed on {graph} ({last}); it needs {how_to_install('openvino')}.") from error
    return np.load(logits)

"""Run a graph in a process of its own: on this CPU as it is, or as on one without VNNI."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hf_saq.installing import how_to_install

from . import run_graph

HERE, WITHOUT_VNNI = "here", "no-vnni"
PLACES = (HERE, WITHOUT_VNNI)
SOURCE = Path(__file__).with_name("without_vnni.c")


def run_elsewhere(engine: str, place: str, graph: Path, images: Path) -> np.ndarray:
    """Compute the logits of a graph.

    Args:
        engine: A key of `run_graph.ENGINES`.
        place: One of `PLACES`.
        graph: The file of the graph.
        images: A file of numpy with its input.
    """
    with tempfile.TemporaryDirectory() as directory:
        logits = Path(directory) / "logits.npy"
        environment = dict(os.environ)
        if place == WITHOUT_VNNI:
            environment["LD_PRELOAD"] = str(compiled(Path(directory)))
        command = [sys.executable, run_graph.__file__, str(graph), str(images), str(logits), "--engine", engine]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
            raise ValueError(f"{engine} failed on {graph}, {place}: {last}. It needs {how_to_install('openvino')}.")
        return np.load(logits)


def compiled(directory: Path) -> Path:
    """Compile what hides features of the CPU."""
    library = directory / "without_vnni.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        raise ValueError(
            f"{SOURCE.name} could not be compiled ({said}); it needs a C compiler on x86-64 Linux."
        ) from error
    return library

"""Starts other Python processes with this package and these modules on their path, one thread each and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hf_saq

SUPPORT = Path(__file__).parent
HANGS = 1800.0
"""Seconds after which a process is given up: far above what any takes on a slow machine, for those that hang."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of this process with the settings above and `changes`."""
    path = [str(SUPPORT), str(Path(hf_saq.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(entry for entry in path if entry),
        **changes,
    }


def run_python(*arguments: object, processes: int = 1, cwd: Path | None = None, **changes: str):
    """Run `python ARGUMENTS`, in several processes of torchrun where asked to, and require that it succeeds.

    Args:
        changes: Environment variables.

    Returns: what `subprocess.run` does, with both outputs as text.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done

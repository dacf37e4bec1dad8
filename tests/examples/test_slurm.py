"""The SLURM script starts a launcher on each node, with the rank of that node and all arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_the_second_of_two_nodes_runs(tmp_path):
    programs = {
        # More names than a pipe holds: a script that stops reading after the first would break it.
        "scontrol": '[ "$*" = "show hostnames n[1-2]" ] && printf "n%d\\n" {1..20000}',
        "srun": 'SLURM_NODEID=1 exec "$@"',
        "accelerate": 'printf "%s\\n" "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(ROOT / "examples" / "slurm.sh"), "my arguments.yaml", "--rho", "0.1"]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    given = outcome.stdout.splitlines()
    for option, value in (("--num_machines", "2"), ("--num_processes", "8"), ("--machine_rank", "1")):
        assert given[given.index(option) + 1] == value
    assert given[given.index("--main_process_ip") + 1] == "n1"
    script = given.index("examples/run_image_classification.py")
    assert given[script + 1 :] == ["my arguments.yaml", "--rho", "0.1", "--resume_from_checkpoint", "true"]

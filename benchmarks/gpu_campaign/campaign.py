"""Run everything that wants a GPU, in under nine minutes on one card.

    python -m benchmarks.gpu_campaign.campaign               # what `make gpu-campaign` runs
    python -m benchmarks.gpu_campaign.campaign --rehearsal   # on CPU, at the smallest sizes: does every stage start?

Says first what the machine lacks. Each stage is a process with a time limit; one that fails does not stop the others.
What was measured is written as soon as it is there, so that a machine that is taken away leaves what it did.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..shared.command_line import parsed
from ..shared.places import RESULTS
from ..shared.runs import versions, write_whole
from .requirements import machine, missing
from .stages import Stage, stages

ENOUGH = 530
"""Seconds in all after which no further stage begins, and at which the running one is ended."""
TAIL = 2000
"""Characters of a failed stage's output that are stored."""


@dataclass
class CampaignArguments:
    """Where things are, and whether this is a rehearsal."""

    file: str = field(default="outputs/gpu-data/flowers-vit-224.safetensors", metadata={"help": "Of `make gpu-data`."})
    results: str = field(default=f"{RESULTS}/gpu", metadata={"help": "Where the JSON results go."})
    cache: str = field(default="outputs/gpu-cache", metadata={"help": "Unpacked images and the float model."})
    seconds: int = field(default=ENOUGH, metadata={"help": "For all stages together."})
    only: list[str] | None = field(default=None, metadata={"help": "Names of stages to run, or how they begin."})
    rehearsal: bool = field(default=False, metadata={"help": "On CPU, at the smallest sizes."})


def main(argv: Sequence[str] | None = None) -> int:
    args, command = parsed(CampaignArguments, argv, "benchmarks.gpu_campaign.campaign", __doc__)
    device, file, results = "cpu" if args.rehearsal else "cuda", Path(args.file), Path(args.results)
    fatal, lost = missing(device, file, needs_data=not args.rehearsal)
    for sentence in lost:
        print(f"note: {sentence}", flush=True)
    if fatal:
        print("\n".join(f"cannot start: {sentence}" for sentence in fatal), flush=True)
        return 2
    planned = stages(results, Path(args.cache), file, args.rehearsal, with_data=file.is_file() and not args.rehearsal)
    if args.only:
        planned = [stage for stage in planned if stage.name.startswith(tuple(args.only))]
    report: dict[str, Any] = {"command": command, "machine": machine(device), "versions": versions(), "missing": lost}
    report["stages"] = {}
    results.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + args.seconds
    for stage in planned:
        left = ends - time.monotonic()
        report["stages"][stage.name] = run(stage, left) if left > 5 else {"state": "no time was left"}
        write_whole(results / "campaign.json", json.dumps(report, indent=1) + "\n")
    states = {name: found["state"] for name, found in report["stages"].items()}
    print(json.dumps(states, indent=1), flush=True)
    return 0 if set(states.values()) <= {"done", "as much as fitted"} else 1


def run(stage: Stage, left: float) -> dict[str, Any]:
    """Run one stage and say how it ended: `done`, `as much as fitted`, `failed` or `out of time`."""
    print(f"== {stage.name}", flush=True)
    started = time.monotonic()
    limit = min(stage.seconds, left)
    output = ""
    # Give the stage a session of its own, so that processes that it starts end with it and let go of the pipe.
    process = subprocess.Popen(
        stage.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        state = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # stored runs are written whole or not at all
        output, _ = process.communicate()
        state = "as much as fitted" if stage.open_ended else "out of time"
    print(output[-TAIL:], flush=True)
    told = {} if state in ("done", "as much as fitted") else {"output": output[-TAIL:]}
    return {"state": state, "seconds": round(time.monotonic() - started, 1), **told}


if __name__ == "__main__":
    sys.exit(main())

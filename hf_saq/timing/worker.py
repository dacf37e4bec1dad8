"""Run one form in a process of its own: load it, then answer one request after the other.

Requests and answers are lines of JSON on the standard streams; see [`answer`]. A process of its own has the threads
that it was told to have, whichever library they belong to, and memory that nobody else uses.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .loading import LOADERS, RunFunction
from .memory import forget_peak, peak_bytes, resident_bytes

MOST_CALLS = 100
"""Calls of one request."""


def main() -> None:
    """Serve the form that the first request names, until the stream of requests ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like
    try:
        started = json.loads(sys.stdin.readline())
        load = LOADERS[started["loader"]](Path(started["path"]), started["threads"])
        images = np.load(started["images"])
        gc.collect()
        before = resident_bytes()
        run = load()
        _send(answers, {"ready": True})
        for line in sys.stdin:
            _send(answers, answer(json.loads(line), run, images, before))
    except Exception as error:  # whatever the library raises becomes the reason that is told
        _send(answers, {"error": f"{type(error).__name__}: {error}"})


def answer(request: dict[str, Any], run: RunFunction, images: np.ndarray, before: int | None) -> dict[str, Any]:
    """Carry out one request.

    `{"logits": path}` stores the logits of all images. `{"batch": n, "seconds": s}` runs a batch again and again for
    as long and answers with `wall` and `cpu`, the seconds of each call, and with `memory`, the bytes beyond those of
    the process before it loaded anything.
    """
    if "logits" in request:
        np.save(request["logits"], np.concatenate([run(images[i : i + 1]) for i in range(len(images))]))
        return {"done": True}
    batch = np.ascontiguousarray(images[np.arange(request["batch"]) % len(images)])
    forget_peak()
    wall: list[float] = []
    cpu: list[float] = []
    while not wall or (sum(wall) < request["seconds"] and len(wall) < MOST_CALLS):
        start, start_cpu = time.perf_counter(), time.process_time()
        run(batch)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    peak = peak_bytes()
    return {"wall": wall, "cpu": cpu, "memory": None if peak is None or before is None else peak - before}


def _send(answers: TextIO, values: dict[str, Any]) -> None:
    print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    main()

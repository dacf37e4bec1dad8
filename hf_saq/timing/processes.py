"""Start the process of a form, and ask it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

START = "from hf_saq.timing.worker import main; main()"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """Says why the process of a form ended."""


class Worker:
    """A process that has loaded one form; ends with the context.

    Args:
        request: What `worker.main` reads first.
        stage: Directory that it starts in and writes to.

    Raises:
        WorkerError: If it cannot load the form.
    """

    def __init__(self, request: dict[str, Any], stage: Path):
        threads = str(request["threads"])
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        environment.update(dict.fromkeys(THREAD_VARIABLES, threads))
        self._log = (stage / f"{request['name']}-{threads}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", START],
            cwd=stage,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.ask(request)
        except WorkerError:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            WorkerError: If the process reports an error or has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        found = json.loads(line) if line else {"error": self._last_words()}
        if "error" in found:
            raise WorkerError(found["error"])
        return found

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

"""Finished runs of a benchmark: one JSON file each, written when a run ends, found again when the script restarts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import hf_saq


@dataclass(frozen=True)
class Runs:
    """The runs in one directory.

    Attributes:
        directory: Holds `<name>.json` for each run.
        command: What to type to get them, stored with each.
        versions: Of what runs here, as it was when this process read it.
    """

    directory: Path
    command: str
    versions: dict[str, str] = field(default_factory=lambda: versions())
    _locks: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock), repr=False)

    def stored(self, name: str) -> dict[str, Any] | None:
        """The record of the run `name`, if there is one."""
        path = self.directory / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def once(self, name: str, arguments: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored record of the run `name`, or the one of `run()`, which is stored at once.

        Args:
            arguments: Everything the outcome depends on, JSON-plain. A stored run must have had the same.
            run: Computes the outcome, JSON-plain.

        Returns:
            `{"name", "arguments", "outcome", "seconds", "versions", "command"}`.

        Raises:
            ValueError: If a run of this name is stored that had other arguments.
        """
        with self._locks[name]:  # threads that want the same run wait for the first of them
            return self._once(name, arguments, run)

    def _once(self, name: str, arguments: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        record = self.stored(name)
        if record is not None:
            if record["arguments"] != arguments:
                told = {k: (record["arguments"].get(k), arguments.get(k)) for k in {*record["arguments"], *arguments}}
                differing = {k: pair for k, pair in sorted(told.items()) if pair[0] != pair[1]}
                raise ValueError(
                    f"{self.directory / name}.json: this run is stored with other arguments, {differing} (stored, "
                    "now); expected the same. Remove the file, or write to another directory of results."
                )
            return record
        started = time.perf_counter()
        outcome = run()
        record = {
            "name": name,
            "arguments": arguments,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - started, 1),
            "versions": self.versions,
            "command": self.command,
        }
        self.store(record)
        print(name, {k: v for k, v in outcome.items() if isinstance(v, (int, float, str))}, flush=True)
        return record

    def store(self, record: dict[str, Any]) -> None:
        """Write one record where [`stored`] finds it."""
        write_whole(self.directory / f"{record['name']}.json", json.dumps(record, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that an interruption leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def records_in(directory: Path, names: str = "*.json") -> list[dict[str, Any]]:
    """Read every stored result in `directory` whose name fits the pattern `names`, in the order of the names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob(names))]


def versions_of(records: Iterable[dict[str, Any]]) -> list[str]:
    """List the sets of versions that records were made with, each once, with the commits that had them: `python 3.11,
    torch 2.9, commits 0eececa, 107a589`."""
    commits: dict[str, set[str]] = {}
    for record in records:
        versions = dict(record["versions"])
        commit = versions.pop("commit", None)
        commits.setdefault(", ".join(f"{k} {v}" for k, v in versions.items()), set()).update(
            [commit] if commit else []
        )
    return sorted(
        f"{versions}, {'commit' if len(of) == 1 else 'commits'} {', '.join(sorted(of))}" if of else versions
        for versions, of in commits.items()
    )


def version_of(package: str) -> str | None:
    """The installed version; `None` where the package is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of Python and of the libraries; of this repository the commit, `-dirty` where files differ from it."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_saq": hf_saq.__version__,
    }
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # not a checkout
    return found


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that differ where any value of `state` does."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

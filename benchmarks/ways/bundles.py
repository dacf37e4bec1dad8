"""Stored runs in few files: one JSON file for each task and way, one line for each run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.runs import Runs, write_whole


@dataclass(frozen=True)
class BundledRuns(Runs):
    """The runs in one directory, named `<file>/<run>`."""

    def stored(self, name: str) -> dict[str, Any] | None:
        return next((record for record in self._bundle_of(name) if record["name"] == name), None)

    def store(self, record: dict[str, Any]) -> None:
        lines = [json.dumps(r) for r in [*self._bundle_of(record["name"]), record]]
        write_whole(self._path_of(record["name"]), "[\n" + ",\n".join(lines) + "\n]\n")

    def _path_of(self, name: str) -> Path:
        return self.directory / f"{name.split('/')[0]}.json"

    def _bundle_of(self, name: str) -> list[dict[str, Any]]:
        path = self._path_of(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def bundled_records(directory: Path) -> list[dict[str, Any]]:
    """Read every record of every file in `directory`."""
    return [r for path in sorted(directory.glob("*.json")) for r in json.loads(path.read_text(encoding="utf-8"))]

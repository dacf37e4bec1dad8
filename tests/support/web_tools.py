"""What the tests in a browser and under node need, and how to skip where it is not there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).parents[2] / "web"


def needs_node(*packages: str) -> None:
    """Skip unless node runs here and `packages` lie in web/node_modules (`make test-web` puts them there)."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    missing = [name for name in packages if not (WEB / "node_modules" / name / "package.json").is_file()]
    if missing:
        pytest.skip(f"web/node_modules has no {', '.join(missing)}: `make test-web` installs what it needs")


def node(script: str, *arguments: object, given: bytes = b"", timeout: float = 120) -> subprocess.CompletedProcess:
    """Run `web/<script>`; stdout and stderr are text."""
    command = ["node", str(WEB / script), *map(str, arguments)]
    found = subprocess.run(command, input=given, capture_output=True, timeout=timeout)
    return subprocess.CompletedProcess(command, found.returncode, found.stdout.decode(), found.stderr.decode())

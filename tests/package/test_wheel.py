"""The wheel, built without a network from a copy of the sources: it holds every room, and nothing but rooms."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from processes import HANGS

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, sources / name)
    for name in ("hf_saq", "benchmarks", "examples", "tests"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    outcome = subprocess.run([sys.executable, "-c", BUILD], cwd=sources, capture_output=True, text=True, timeout=HANGS)
    assert outcome.returncode == 0, outcome.stderr
    return ZipFile(sources / "dist" / outcome.stdout.splitlines()[-1])


def test_every_room_is_in_the_wheel(wheel: ZipFile):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_saq").rglob("*.py")} | {"hf_saq/py.typed"}
    assert packed == expected
    rooms = {name.rpartition("/")[0] for name in packed}
    assert {"hf_saq/storage", "hf_saq/cli", "hf_saq/sharpness/schedules"} <= rooms
    for room in rooms:
        assert f"{room}/__init__.py" in packed


def test_what_the_wheel_says_of_itself(wheel: ZipFile, tmp_path: Path):
    """Read from the package in the wheel alone: neither torch nor transformers is needed for that."""
    wheel.extractall(tmp_path)
    (information,) = tmp_path.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(information / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"hf-saq": "hf_saq.cli:main"}
    code = "import hf_saq; from hf_saq.cli import main; print(hf_saq.__file__, hf_saq.__version__); main(['--help'])"
    # -S: no site-packages, so that nothing but the wheel can be imported
    outcome = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS
    )
    file, version = outcome.stdout.split("\n")[0].rsplit(" ", 1)
    assert Path(file).parent == tmp_path / "hf_saq" and f"-{version}.dist-info" in information.name
    assert "usage: hf-saq" in outcome.stdout and outcome.returncode == 0, outcome.stderr

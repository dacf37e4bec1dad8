"""One place says how to install hf_saq, and nobody is told to install a name that nobody owns."""

from __future__ import annotations

import re
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

from hf_saq.cli import main
from hf_saq.installing import how_to_install
from hf_saq.version import __version__

ROOT = Path(__file__).parents[2]


def with_metadata(monkeypatch, *urls: str) -> None:
    found = Message()
    for url in urls:
        found["Project-URL"] = url
    monkeypatch.setattr(metadata, "metadata", lambda name: found)


def test_it_comes_from_the_metadata(monkeypatch):
    with_metadata(monkeypatch, "Paper, https://arxiv.org/abs/2111.12273")
    assert how_to_install() == "pip install . (in a copy of the source of hf_saq)"
    with_metadata(monkeypatch, "Paper, https://arxiv.org/abs/2111.12273", "Repository, https://example.org/hf_saq")
    assert how_to_install() == "pip install git+https://example.org/hf_saq"
    assert how_to_install("onnx") == "pip install 'hf-saq[onnx] @ git+https://example.org/hf_saq'"


def test_also_where_nothing_is_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    assert how_to_install().startswith("pip install . ")


def test_no_text_names_a_package_of_an_index():
    """In the package, the examples, the benchmarks and the documents."""
    files = [path for end in ("py", "md", "yml", "toml") for path in ROOT.glob(f"*.{end}")]
    files += [
        path for room in ("hf_saq", "examples", "benchmarks", "docs", ".github") for path in (ROOT / room).rglob("*")
    ]
    told = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        if path.suffix in (".py", ".md", ".yml", ".yaml", ".ipynb", ".toml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install [^`\"]*\bhf[-_]saq\b(?!\))", line)
    ]
    assert len(files) > 100 and not told


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"hf_saq {__version__}\n"

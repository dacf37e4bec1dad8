"""The notebook of the quickstart: the code of the README, and it runs in a kernel of its own."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from quickstart_data import LABELS, lay_out
from test_readme import quickstart

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line]


def test_its_code_is_that_of_the_readme():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert lines("\n".join(cell.source for cell in code)) == lines(quickstart())
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "clear the outputs"


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """What it loads by name are tiny directories of these names."""
    client = pytest.importorskip("nbclient")
    lay_out(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    said = "".join(output.get("text", "") for output in last.outputs)
    assert any(label in said for label in LABELS)

"""The README is short, its quickstart runs word for word; its figures and the guide's are those of the results."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from quickstart_data import LABELS, lay_out
from readme_table import END, START, table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INTERVAL = r"[-+]\d+\.\d+ \[[-+]\d+\.\d+, [-+]\d+\.\d+\]"
"""A difference with its 95 % interval, as pages write it."""


def quickstart() -> str:
    (block,) = re.findall(r"<!-- runs as a test, word for word -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    return block


def test_the_quickstart_runs_from_data_to_a_pipeline(tmp_path, monkeypatch, capsys):
    """Word for word; what it loads by name are tiny directories of these names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    exec(quickstart(), {})
    said = capsys.readouterr().out
    assert "'eval_accuracy': " in said and "[{'label': " in said and any(label in said for label in LABELS)
    assert (tmp_path / "vit-w4a4" / "model.safetensors").is_file()


def test_it_is_short():
    """The table of results grows with the tasks, and is no prose."""
    text = README.split(START)[0] + README.split(END)[1]
    assert len(text.splitlines()) <= 130


def test_its_figures_are_those_of_the_results():
    assert README.split(START)[1].split(END)[0] == table()
    assert table().count("\n") > 5


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_intervals_in_its_prose_are_those_of_the_pages_of_results(page):
    """What is quoted by hand must not outlive the runs that it came from."""
    pages = ("results", "schedules", "flatness", "ways")
    written = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in pages)
    quoted = re.findall(INTERVAL, " ".join((ROOT / page).read_text().split()))
    assert quoted and not [found for found in quoted if found not in written]


def test_what_bits_by_budget_gain_is_what_their_page_says():
    page = (ROOT / "docs" / "flatness.md").read_text()
    gains = re.findall(r"\| [^|]*, the bit operations of W3A3 \|.*\| \**([-+][^*|]*\])\** \|", page)
    bullet = README.partition("**Bits where they matter**")[2].partition("- **")[0]
    quoted = re.findall(r"[-+]\d+\.\d+ \[[^]]*\]", bullet)
    assert len(gains) == 2 and sorted(gains) == sorted(quoted)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:examples|docs)/[\w./]+\.\w+", README))))
def test_files_that_it_names_exist(path):
    assert (ROOT / path).exists()

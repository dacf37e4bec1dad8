"""The record of what `sensitivity` costs: the script writes one, and the page quotes the one that is stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.sensitivity_cost import measure
from benchmarks.shared.places import RESULTS

ROOT = Path(__file__).parents[2]


def test_it_measures_any_model_and_stores_what_it_found(tmp_path):
    pytest.importorskip("timm")
    words = "--model test_resnet --images 4 --size 32 --batch 2 --candidates 2 8 --results".split()
    measure.main([*words, str(tmp_path)])
    record = json.loads((tmp_path / "test_resnet.json").read_text())
    outcome = record["outcome"]
    assert outcome["entries"] == 2 * 2 * outcome["layers"] > 0  # two operands, two candidates
    ratio = outcome["cpu_seconds_of_the_analysis"] / outcome["cpu_seconds_of_a_pass"]
    assert outcome["evaluation_passes"] == pytest.approx(ratio) and record["arguments"]["size"] == 32


def test_the_page_quotes_the_stored_record():
    record = json.loads((ROOT / RESULTS / "sensitivity_cost" / "resnet18.json").read_text())
    arguments, passes = record["arguments"], record["outcome"]["evaluation_passes"]
    assert (arguments["model"], arguments["images"], arguments["candidates"]) == ("resnet18", 128, [2, 3, 4, 6, 8])
    quoted = re.search(
        r"([\d.]+) times the processor\s+time of one evaluation pass", (ROOT / "docs/analysis.md").read_text()
    )
    assert quoted is not None and float(quoted[1]) == round(passes, 1) and passes <= 20

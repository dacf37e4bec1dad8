"""The files that invite people into the repository: they can be read, and say what is so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from hf_saq.version import __version__

ROOT = Path(__file__).parents[2]


def test_the_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["cff-version"] == "1.2.0" and found["message"] and found["title"].startswith("hf_saq")
    assert found["authors"] == [{"name": "The hf_saq authors"}] and str(found["version"]) == __version__
    (paper,) = found["references"]
    assert paper["url"].endswith("2111.12273") and [a["family-names"] for a in paper["authors"]] == [
        "Liu",
        "Cai",
        "Zhuang",
    ]


def test_hosted_checks_are_those_of_every_machine():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    (run,) = (step["run"] for step in steps if "run" in step)
    assert os.access(ROOT / run, os.X_OK)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms(name):
    """Each field has an id of its own and a label, which the form needs."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_commands_that_templates_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    template = (ROOT / ".github" / "pull_request_template.md").read_text()
    for target in ("quality", "test"):
        assert f"`make {target}`" in template and f"\n{target}: " in makefile

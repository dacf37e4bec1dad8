"""What takes seconds to import is imported when it is needed: seen in `sys.modules`, not measured with a clock."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate")


def loaded_by(code: str) -> set[str]:
    """The modules that a new process has after `code`."""
    code += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stderr
    return set(json.loads(outcome.stdout.splitlines()[-1]))


HELP = """
import runpy, sys
sys.argv = ["hf-saq", "--help"]
try:
    runpy.run_module("hf_saq", run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
"""


@pytest.mark.parametrize(
    "code",
    ["import hf_saq; hf_saq.__version__; dir(hf_saq)", "import hf_saq.storage, hf_saq.hub, hf_saq.conversion", HELP],
    ids=["package", "rooms", "help"],
)
def test_it_loads_nothing_heavy(code: str):
    loaded = loaded_by(code)
    assert "hf_saq.registration" in loaded
    assert not loaded & set(HEAVY)


def test_parts_of_training_do_not_load_the_trainer():
    loaded = loaded_by("from hf_saq import parameter_groups; import hf_saq.training; hf_saq.training.what_is_missing")
    assert "torch" in loaded and "hf_saq.training.checkpoints" in loaded
    assert not loaded & {"transformers", "hf_saq.training.trainer"}


def test_a_row_of_results_does_not_load_the_trainer():
    loaded = loaded_by("from hf_saq.hub import ResultRow")
    assert "hf_saq.hub.card_facts" in loaded and "transformers.trainer" not in loaded

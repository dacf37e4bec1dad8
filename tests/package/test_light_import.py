"""What takes seconds to import is imported when it is needed: seen in `sys.modules`, not measured with a clock."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANGS

import hf_saq

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate")


def loaded_by(code: str) -> set[str]:
    """The modules that a new process has after `code`."""
    code += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
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
    [
        "import hf_saq; hf_saq.__version__; dir(hf_saq)",
        "import hf_saq.storage, hf_saq.hub, hf_saq.conversion, hf_saq.analysis",
        HELP,
    ],
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


def test_an_analysis_loads_what_it_solves_and_draws_with_when_it_does():
    loaded = loaded_by("from hf_saq.analysis import allocate_bits, landscape, sharpness")
    assert "hf_saq.analysis.bits.integer_program" in loaded
    assert not loaded & {"scipy", "matplotlib", "transformers.trainer"}


def test_what_registers_first_is_made_of_parts_that_need_no_models():
    """It is imported when `transformers.quantizers` is complete, and more of transformers may be half loaded then."""
    source = Path(hf_saq.__file__).with_name("storage") / "from_pretrained.py"
    nodes = [n for n in ast.parse(source.read_text()).body if isinstance(n, ast.ImportFrom) and n.level]
    imports = [f"from hf_saq.{n.module or ''} import {n.names[0].name}" for n in nodes if n.level == 2 and n.module]
    imports += [f"import hf_saq.{alias.name}" for n in nodes if not n.module for alias in n.names]
    assert "import hf_saq.conversion" in imports and any("hf_saq.config" in line for line in imports)
    loaded = loaded_by("\n".join(imports))
    assert {"torch", "hf_saq.layers", "hf_saq.config.quantization"} <= loaded
    assert not loaded & {"transformers.quantizers", "transformers.modeling_utils"}
